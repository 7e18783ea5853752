"""Device functions that every Triton kernel shares: packed codes of a tile of rows, their levels, the nearest level.

Layout (see ``codec.packing``): codes of a row form a little-endian bit stream that starts at a byte boundary; a block of
32 codes or a multiple starts at a whole word of the row. A tile has its codes in groups, (rows, groups, codes of a group):
those of one 32-bit word, and with 3 bits those of 24 bits, eight of which make three words of four groups.
"""

import triton
import triton.language as tl


@triton.jit
def group_size(BITS: tl.constexpr):
    """Codes of a group."""
    return 8 if BITS == 3 else 32 // BITS


@triton.jit
def load_words(units, row, index, length, ALIGNED: tl.constexpr):
    """32-bit words ``index`` of the rows at ``row``, both broadcast to a tile; beyond the row's ``length`` units, 0."""
    if ALIGNED:
        return tl.load(units + (row + index), mask=index < length, other=0).to(tl.uint32, bitcast=True)
    word = tl.zeros((row + index).shape, tl.uint32)
    for k in tl.static_range(4):
        at = index * 4 + k
        byte = tl.load(units + (row + at), mask=at < length, other=0)
        word |= byte.to(tl.uint32) << (8 * k)
    return word


@triton.jit
def load_codes(units, row, first, length, BITS: tl.constexpr, ALIGNED: tl.constexpr, K: tl.constexpr):
    """Codes ``first`` to ``first + K`` of each row as (rows, groups, codes of a group) int32; ``first`` divides by 32.

    ``row`` (rows,): where each row starts in ``units``.
    """
    start = row[:, None]
    if BITS == 3:
        triple = (first // 32 + tl.arange(0, K // 32)[None, :]) * 3
        a = load_words(units, start, triple, length, ALIGNED)
        b = load_words(units, start, triple + 1, length, ALIGNED)
        c = load_words(units, start, triple + 2, length, ALIGNED)
        # four groups of 24 bits; what lies above their bits falls to the mask below
        even = tl.join(a, (b >> 16) | (c << 16))
        odd = tl.join((a >> 24) | (b << 8), c >> 8)
        words = tl.reshape(tl.join(even, odd), (row.shape[0], K // 8))
    else:
        index = first * BITS // 32 + tl.arange(0, K * BITS // 32)[None, :]
        words = load_words(units, start, index, length, ALIGNED)
    shifts = (tl.arange(0, 8 if BITS == 3 else 32 // BITS) * BITS).to(tl.uint32)
    return ((words[:, :, None] >> shifts[None, None, :]) & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def load_levels(codebook, row, codes, BITS: tl.constexpr, BY_ROW: tl.constexpr):
    """float32 levels of a (rows, groups, codes) tile; ``row`` (rows,) are its rows' numbers."""
    own = (row * (1 << BITS) if BY_ROW else tl.zeros_like(row))[:, None, None]
    if BITS == 2:  # choosing among four numbers in registers takes no memory access a code
        low, high = (codes & 1) != 0, (codes & 2) != 0
        lower = tl.where(low, tl.load(codebook + own + 1), tl.load(codebook + own))
        upper = tl.where(low, tl.load(codebook + own + 3), tl.load(codebook + own + 2))
        return tl.where(high, upper, lower).to(tl.float32)
    return tl.load(codebook + (own + codes)).to(tl.float32)


@triton.jit
def load_per_group(numbers, row, first, n, blocks, BLOCK: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """(rows, groups) float32: the scale or zero of the block that each group lies in; 0 beyond the row."""
    at = first + tl.arange(0, GROUPS)[None, :] * SIZE
    return tl.load(numbers + (row[:, None] * blocks + at // BLOCK), mask=at < n, other=0).to(tl.float32)


@triton.jit
def load_dense(
    units,
    scale,
    zero,
    codebook,
    row,
    first,
    n,
    length,
    blocks,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BY_ROW: tl.constexpr,
    K: tl.constexpr,
):
    """(rows, K) float32 values of the columns from ``first`` on, 0 beyond the row. ``row`` (rows,) int64."""
    SIZE: tl.constexpr = 8 if BITS == 3 else 32 // BITS
    codes = load_codes(units, row * length, first, length, BITS, ALIGNED, K)
    values = load_levels(codebook, row, codes, BITS, BY_ROW)
    if HAS_ZERO:
        offset = load_per_group(zero, row, first, n, blocks, BLOCK, K // SIZE, SIZE)
        step = tl.load(codebook + (row * (1 << BITS) if BY_ROW else tl.zeros_like(row)) + 1).to(tl.float32)
        values += (offset * step[:, None])[:, :, None]
    factor = load_per_group(scale, row, first, n, blocks, BLOCK, K // SIZE, SIZE)
    return tl.reshape(values * factor[:, :, None], (row.shape[0], K))


@triton.jit
def nearest(x, borders, BITS: tl.constexpr):
    """int32 codes of the nearest levels: how many of the 2^bits - 1 borders lie below x, by bisection.

    ``borders``: pointers to the first border, of shape to broadcast with x.
    """
    code = tl.zeros(x.shape, tl.int32)
    for bit in tl.static_range(BITS):
        half: tl.constexpr = 1 << (BITS - 1 - bit)
        code += tl.where(x > tl.load(borders + (code + (half - 1))), half, 0)
    return code
