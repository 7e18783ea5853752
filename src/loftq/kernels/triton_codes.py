"""Device functions that every Triton kernel shares: packed codes of a tile of rows, their levels, the nearest level.

Layout (see ``codec.packing``): codes of a row form a little-endian bit stream that starts at a byte boundary, so eight
codes, a group, start at a byte boundary too and take as many bytes as a code has bits. A tile is (rows, groups, 8): a
thread that holds whole groups multiplies and adds eight numbers without asking another.
"""

import triton
import triton.language as tl


@triton.jit
def load_groups(
    units, row, first, length, BITS: tl.constexpr, ALIGNED: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr
):
    """Groups from column ``first``, a multiple of 32, on as (rows, GROUPS) integers, the first code in the lowest bits.

    What lies above the last of the eight codes may be anything; beyond the row all codes are 0.

    ``row`` (rows,): where each row of ``length`` units starts in ``units``; see
    :func:`loftq.kernels.triton_launch.units_of`. ``WHOLE``: the tile certainly lies within the row.
    """
    group = tl.arange(0, GROUPS)[None, :]
    if not ALIGNED:
        units += first // 8 * BITS
        length -= first // 8 * BITS
        bits = tl.zeros((row.shape[0], GROUPS), tl.uint64 if BITS == 8 else tl.uint32)
        for k in tl.static_range(BITS):
            at = group * BITS + k
            byte = tl.load(units + (row[:, None] + at), mask=at < length, other=0)
            bits |= byte.to(bits.dtype) << (8 * k)
    elif BITS == 3:  # the 24 bits of a group lie in one 32-bit word or two
        units += first // 32 * 3
        length -= first // 32 * 3
        word, last = group * 3 // 4, (group * 3 + 2) // 4
        low = load_within(units + (row[:, None] + word), word, length, WHOLE).to(tl.uint32, bitcast=True)
        high = load_within(units + (row[:, None] + last), last, length, WHOLE).to(tl.uint32, bitcast=True)
        # one word behind the other and shifted: a GPU's funnel shift, one instruction
        bits = ((high.to(tl.uint64) << 32 | low.to(tl.uint64)) >> (group * 3 % 4 * 8).to(tl.uint64)).to(tl.uint32)
    else:
        units += first // 8
        length -= first // 8
        bits = load_within(units + (row[:, None] + group), group, length, WHOLE)
        if BITS == 2:
            bits = bits.to(tl.uint16, bitcast=True).to(tl.uint32)
        elif BITS == 4:
            bits = bits.to(tl.uint32, bitcast=True)
        else:
            bits = bits.to(tl.uint64, bitcast=True)
    return bits


@triton.jit
def load_codes(
    units, row, first, length, BITS: tl.constexpr, ALIGNED: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr
):
    """:func:`load_groups`, taken apart into (rows, GROUPS, 8) uint32 codes."""
    return split_codes(load_groups(units, row, first, length, BITS, ALIGNED, GROUPS, WHOLE), BITS)


@triton.jit
def split_codes(bits, BITS: tl.constexpr):
    """(rows, groups, 8) uint32 codes of (rows, groups) groups."""
    shifts = (tl.arange(0, 8) * BITS).to(bits.dtype)
    return ((bits[:, :, None] >> shifts[None, None, :]) & ((1 << BITS) - 1)).to(tl.uint32)


@triton.jit
def load_within(places, index, length, WHOLE: tl.constexpr):
    """What lies at ``places``; 0 where ``index`` is beyond ``length``, unless that certainly never happens."""
    if WHOLE:
        return tl.load(places)
    return tl.load(places, mask=index < length, other=0)


@triton.jit
def load_levels(codebook, row, codes, BITS: tl.constexpr, BY_ROW: tl.constexpr):
    """float32 levels of a (rows, groups, 8) tile of codes; ``row`` (rows,) are its rows' numbers."""
    if BY_ROW:
        table = codebook + (row * (1 << BITS))[:, None, None]
    else:
        table = codebook + tl.zeros((1, 1, 1), tl.int32)
    if BITS == 8:
        return tl.load(table + codes).to(tl.float32)
    # A table starts at a multiple of its size, so the address of a level is the table's with some bits set: half the
    # instructions of a 64-bit sum, for every code.
    place = table.to(tl.uint64) | (codes.to(tl.uint64) * (codebook.dtype.element_ty.primitive_bitwidth // 8))
    return tl.load(place.to(codebook.dtype)).to(tl.float32)


@triton.jit
def load_per_group(numbers, row, first, n, blocks, BLOCK: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr):
    """(rows, GROUPS) float32: the scale or zero of the block that each group lies in; 0 beyond the row."""
    at = first + tl.arange(0, GROUPS)[None, :] * 8
    return load_within(numbers + (row[:, None] * blocks + at // BLOCK), at, n, WHOLE).to(tl.float32)


@triton.jit
def load_step(codebook, row, BITS: tl.constexpr, BY_ROW: tl.constexpr):
    """(rows,) float32: the unit of the zero points."""
    return tl.load(codebook + (row * (1 << BITS) if BY_ROW else tl.zeros_like(row)) + 1).to(tl.float32)


@triton.jit
def load_values(
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
    GROUPS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """(rows, GROUPS, 8) float32 values of the columns from ``first`` on, 0 beyond the row. ``row`` (rows,) int64."""
    codes = load_codes(units, row * length, first, length, BITS, ALIGNED, GROUPS, WHOLE)
    values = load_levels(codebook, row, codes, BITS, BY_ROW)
    if HAS_ZERO:
        offset = load_per_group(zero, row, first, n, blocks, BLOCK, GROUPS, WHOLE)
        values += (offset * load_step(codebook, row, BITS, BY_ROW)[:, None])[:, :, None]
    return values * load_per_group(scale, row, first, n, blocks, BLOCK, GROUPS, WHOLE)[:, :, None]


@triton.jit
def nearest(x, borders, BITS: tl.constexpr):
    """int32 codes of the nearest levels: how many of the 2^bits - 1 borders lie below x, by bisection.

    ``borders``: pointers to the first border, of shape to broadcast with x.
    """
    code = tl.zeros(x.shape, tl.int32)
    for bit in tl.static_range(BITS):
        below = x > tl.load(borders + (code + ((1 << (BITS - 1 - bit)) - 1)))
        code += tl.where(below, 1 << (BITS - 1 - bit), 0)
    return code
