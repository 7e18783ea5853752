"""Compiled CPU loops from packed codes to values: one pass that reads the packed bytes and writes the dense rows.

Layout (see ``codec.packing``): codes of a row form a little-endian bit stream that starts at a byte boundary. A block
holds a multiple of 32 codes, so every block and every group of sixteen starts at a byte boundary as well. Sixteen values are
made at a time; what is left of a row, one by one.

``width`` is a tuple as long as a code has bits, see :mod:`loftq.kernels.simd_levels`. ``tables`` (rows or 1, 2^bits) float32
are the levels; ``scale`` and ``zero`` (rows, blocks) are float32, or uint16 with float16's bits; ``out`` (rows, in), or the
columns of the blocks from ``begin_block`` to ``end_block``, is float32, uint16 with bfloat16's bits, or int16 with float16's.
"""

import numba
import numpy as np

from loftq.kernels.simd import add16, multiply16, scale_at, spread16, store16
from loftq.kernels.simd_levels import codes16, levels16, row_of

OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy"}


@numba.njit(inline="always")
def code_at(row, bits, i):
    """The ``i``-th code of a packed row, for the ragged end where whole groups do not fit."""
    bit = i * bits
    byte = bit >> 3
    word = np.uint32(row[byte])
    if (bit & 7) + bits > 8:
        word |= np.uint32(row[byte + 1]) << np.uint32(8)
    return (word >> np.uint32(bit & 7)) & np.uint32((1 << bits) - 1)


@numba.njit(**OPTIONS)
def dequantize_rows(
    first, last, width, packed, scale, tables, zero, block_size, in_features, begin_block, end_block, out
):
    has_zero = zero.shape[0] > 0
    lanes = np.empty(16, out.dtype)
    skipped = begin_block * block_size
    for r in range(first, last):
        table = row_of(tables, r)
        row = packed[r]
        target = out[r]
        for b in range(begin_block, end_block):
            s = scale_at(scale, r, b)
            z = scale_at(zero, r, b) * table[1] if has_zero else np.float32(0)
            begin = b * block_size
            end = min(begin + block_size, in_features)
            whole = begin + (end - begin) // 16 * 16
            for i in range(begin, whole, 16):
                value = levels16(width, table, codes16(width, row, i))
                if has_zero:
                    value = add16(value, spread16(z))
                store16(target, i - skipped, multiply16(value, spread16(s)))
            for i in range(whole, end):
                store16(lanes, 0, spread16((table[code_at(row, len(width), i)] + z) * s))
                target[i - skipped] = lanes[0]
