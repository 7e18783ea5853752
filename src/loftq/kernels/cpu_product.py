"""Compiled CPU loops for products of few rows with a packed matrix, which is never written out.

Arguments as in :mod:`loftq.kernels.cpu_unpack`; ``x`` (tokens, in) and ``grad`` (tokens, out) are float32.
"""

import numba
import numpy as np

from loftq.kernels.cpu_unpack import OPTIONS, code_at
from loftq.kernels.simd import add16, load16, multiply16, multiply_add16, prefetch, scale_at, spread16, store16, sum16
from loftq.kernels.simd_levels import chunk_dot, codes16, levels16, row_of, spread_scales

_AHEAD = 4096  # bytes: the processor's own prefetching ends with every page
_FAST = {**OPTIONS, "fastmath": {"contract", "reassoc", "nsz"}}


def chunk_columns(bits: int, block_size: int) -> int:
    """A row's columns are taken in chunks as far as a multiple of this goes; 0 for widths without chunks.

    At 2 and 4 bits a word has a whole number of codes, and 64 bytes are multiplied at once, see :func:`chunk_dot`. What chunks
    leave of a row, and rows of other widths, are taken sixteen codes at a time.
    """
    return max(512 // bits, block_size) if bits in (2, 4) else 0


@numba.njit(inline="always")
def _rest_of_row(width, r, packed, scale, table, zero, block_size, x, sums, t):
    """What vectors of whole blocks leave: the last, shorter block, and the zeros."""
    found = np.float32(0)
    for i in range(x.shape[1] // block_size * block_size, x.shape[1]):
        found += table[code_at(packed[r], len(width), i)] * x[t, i]
    if found != 0:
        found *= scale_at(scale, r, scale.shape[1] - 1)
    if zero.shape[0] > 0:
        for b in range(scale.shape[1]):
            found += scale_at(zero, r, b) * table[1] * scale_at(scale, r, b) * sums[t, b]
    return found


@numba.njit(**_FAST)
def product_rows(first, last, width, each, packed, scale, tables, zero, block_size, x, chunked, whole, sums, out):
    """out[t, r] = sum over i of W[r, i] x[t, i]. ``sums`` (tokens, blocks): of x over each block.

    ``chunked`` (tokens, whole) has the first columns in the order of the chunks, see :func:`chunk_columns`, and ``each`` is
    a tuple as long as a chunk has scales. Two rows at a time, so that each part
    of x is loaded once for both and two sums are under way at once.
    """
    bits = len(width)
    chunk = 512 // bits
    for r in range(first, last, 2):
        other = min(r + 1, last - 1)
        row_a, row_b = packed[r], packed[other]
        table_a, table_b = row_of(tables, r), row_of(tables, other)
        for t in range(x.shape[0]):
            inputs = x[t]
            total_a = spread16(np.float32(0))
            total_b = spread16(np.float32(0))
            for begin in range(0, whole, chunk):
                byte = begin * bits // 8
                prefetch(row_a, byte + _AHEAD)
                prefetch(row_b, byte + _AHEAD)
                dot_a = chunk_dot(width, table_a, row_a, byte, chunked[t], begin)
                dot_b = chunk_dot(width, table_b, row_b, byte, chunked[t], begin)
                total_a = multiply_add16(dot_a, spread_scales(each, scale, r, begin // block_size), total_a)
                total_b = multiply_add16(dot_b, spread_scales(each, scale, other, begin // block_size), total_b)
            for b in range(whole // block_size, x.shape[1] // block_size):
                begin = b * block_size
                prefetch(row_a, begin * bits // 8 + _AHEAD)
                prefetch(row_b, begin * bits // 8 + _AHEAD)
                part = load16(inputs, begin)
                dot_a = multiply16(levels16(width, table_a, codes16(width, row_a, begin)), part)
                dot_b = multiply16(levels16(width, table_b, codes16(width, row_b, begin)), part)
                for i in range(begin + 16, begin + block_size, 16):
                    part = load16(inputs, i)
                    dot_a = multiply_add16(levels16(width, table_a, codes16(width, row_a, i)), part, dot_a)
                    dot_b = multiply_add16(levels16(width, table_b, codes16(width, row_b, i)), part, dot_b)
                total_a = multiply_add16(dot_a, spread16(scale_at(scale, r, b)), total_a)
                total_b = multiply_add16(dot_b, spread16(scale_at(scale, other, b)), total_b)
            out[t, r] = sum16(total_a) + _rest_of_row(width, r, packed, scale, table_a, zero, block_size, x, sums, t)
            out[t, other] = sum16(total_b) + _rest_of_row(
                width, other, packed, scale, table_b, zero, block_size, x, sums, t
            )


@numba.njit(inline="always")
def _add_row(width, r, packed, table, scale, zero, block_size, begin_block, end_block, g, target):
    """target += g * W[r] from block ``begin_block`` on, one row at a time."""
    n = target.shape[0]
    for b in range(begin_block, end_block):
        s = scale_at(scale, r, b) * g
        z = scale_at(zero, r, b) * table[1] * s if zero.shape[0] > 0 else np.float32(0)
        for i in range(b * block_size, min((b + 1) * block_size, n)):
            target[i] += table[code_at(packed[r], len(width), i)] * s + z


@numba.njit(**_FAST)
def grad_rows(first, last, width, packed, scale, tables, zero, block_size, grad, out):
    """out[c, t, i] = sum over the rows r of chunk c of W[r, i] grad[t, r]; chunks of ``rows / chunks`` rows.

    Four rows at a time, so that each part of the result is loaded and stored once for all four.
    """
    rows, chunks, n = packed.shape[0], out.shape[0], out.shape[2]
    whole = n // block_size
    has_zero = zero.shape[0] > 0
    for c in range(first, last):
        begin_row, end_row = rows * c // chunks, rows * (c + 1) // chunks
        for t in range(grad.shape[0]):
            target = out[c, t]
            target[:] = 0
            quads = begin_row + (end_row - begin_row) // 4 * 4
            for r in range(begin_row, quads, 4):
                row_0, row_1, row_2, row_3 = packed[r], packed[r + 1], packed[r + 2], packed[r + 3]
                table_0, table_1 = row_of(tables, r), row_of(tables, r + 1)
                table_2, table_3 = row_of(tables, r + 2), row_of(tables, r + 3)
                for b in range(whole):
                    s0 = scale_at(scale, r, b) * grad[t, r]
                    s1 = scale_at(scale, r + 1, b) * grad[t, r + 1]
                    s2 = scale_at(scale, r + 2, b) * grad[t, r + 2]
                    s3 = scale_at(scale, r + 3, b) * grad[t, r + 3]
                    offset = np.float32(0)
                    if has_zero:
                        offset = scale_at(zero, r, b) * table_0[1] * s0 + scale_at(zero, r + 1, b) * table_1[1] * s1
                        offset += (
                            scale_at(zero, r + 2, b) * table_2[1] * s2 + scale_at(zero, r + 3, b) * table_3[1] * s3
                        )
                    f0, f1, f2, f3 = spread16(s0), spread16(s1), spread16(s2), spread16(s3)
                    for i in range(b * block_size, b * block_size + block_size, 16):
                        value = add16(load16(target, i), spread16(offset))
                        value = multiply_add16(levels16(width, table_0, codes16(width, row_0, i)), f0, value)
                        value = multiply_add16(levels16(width, table_1, codes16(width, row_1, i)), f1, value)
                        value = multiply_add16(levels16(width, table_2, codes16(width, row_2, i)), f2, value)
                        value = multiply_add16(levels16(width, table_3, codes16(width, row_3, i)), f3, value)
                        store16(target, i, value)
                for k in range(r, r + 4):
                    table = row_of(tables, k)
                    _add_row(
                        width, k, packed, table, scale, zero, block_size, whole, scale.shape[1], grad[t, k], target
                    )
            for r in range(quads, end_row):
                table = row_of(tables, r)
                _add_row(width, r, packed, table, scale, zero, block_size, 0, scale.shape[1], grad[t, r], target)
