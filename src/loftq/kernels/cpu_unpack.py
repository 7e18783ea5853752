"""Compiled CPU loops from packed codes to values: one pass that reads the packed bytes and writes the dense rows.

Layout (see ``codec.packing``): codes of a row form a little-endian bit stream that starts at a byte boundary. A block
holds a multiple of eight codes, so every block starts at a byte boundary as well, for any width of 2, 3, 4 or 8 bits.
"""

import numba
import numpy as np

_OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy"}


@numba.njit(inline="always")
def _code_at(row, bits, i):
    """The ``i``-th code of a packed row, for the ragged end where whole groups do not fit."""
    bit = i * bits
    byte = bit >> 3
    word = np.uint32(row[byte])
    if (bit & 7) + bits > 8:
        word |= np.uint32(row[byte + 1]) << np.uint32(8)
    return (word >> np.uint32(bit & 7)) & np.uint32((1 << bits) - 1)


@numba.njit(**_OPTIONS)
def dequantize_rows_2bit(first, last, packed, scale, codebooks, zero, block_size, in_features, out):
    table = np.empty(4, np.float32)
    has_zero = zero.shape[0] > 0
    for r in range(first, last):
        codebook = codebooks[min(r, codebooks.shape[0] - 1)]
        row = packed[r]
        dst = out[r]
        for b in range(scale.shape[1]):
            s = scale[r, b]
            z = zero[r, b] * codebook[1] if has_zero else np.float32(0)
            for k in range(4):
                table[k] = (codebook[k] + z) * s
            start = b * block_size
            stop = min(start + block_size, in_features)
            whole = start + ((stop - start) // 4) * 4
            at = start >> 2
            t0, t1, t2, t3 = table[0], table[1], table[2], table[3]
            for i in range(at, at + ((whole - start) >> 2)):
                byte = row[i]
                for j in range(4):
                    code = (byte >> (2 * j)) & 3
                    low = t1 if code & 1 else t0
                    high = t3 if code & 1 else t2
                    dst[4 * i + j] = high if code & 2 else low
            for i in range(whole, stop):
                dst[i] = table[_code_at(row, 2, i)]


@numba.njit(**_OPTIONS)
def dequantize_rows_3bit(first, last, packed, scale, codebooks, zero, block_size, in_features, out):
    table = np.empty(8, np.float32)
    has_zero = zero.shape[0] > 0
    for r in range(first, last):
        codebook = codebooks[min(r, codebooks.shape[0] - 1)]
        row = packed[r]
        dst = out[r]
        for b in range(scale.shape[1]):
            s = scale[r, b]
            z = zero[r, b] * codebook[1] if has_zero else np.float32(0)
            for k in range(8):
                table[k] = (codebook[k] + z) * s
            start = b * block_size
            stop = min(start + block_size, in_features)
            groups = (stop - start) // 8
            at = (start // 8) * 3
            for g in range(groups):
                p = at + 3 * g
                word = (
                    np.uint32(row[p])
                    | (np.uint32(row[p + 1]) << np.uint32(8))
                    | (np.uint32(row[p + 2]) << np.uint32(16))
                )
                i = start + 8 * g
                for j in range(8):
                    dst[i + j] = table[(word >> np.uint32(3 * j)) & np.uint32(7)]
            for i in range(start + 8 * groups, stop):
                dst[i] = table[_code_at(row, 3, i)]


@numba.njit(**_OPTIONS)
def dequantize_rows_4bit(first, last, packed, scale, codebooks, zero, block_size, in_features, out):
    table = np.empty(16, np.float32)
    has_zero = zero.shape[0] > 0
    for r in range(first, last):
        codebook = codebooks[min(r, codebooks.shape[0] - 1)]
        row = packed[r]
        dst = out[r]
        for b in range(scale.shape[1]):
            s = scale[r, b]
            z = zero[r, b] * codebook[1] if has_zero else np.float32(0)
            for k in range(16):
                table[k] = (codebook[k] + z) * s
            start = b * block_size
            stop = min(start + block_size, in_features)
            whole = start + ((stop - start) // 2) * 2
            for i in range(start >> 1, whole >> 1):
                byte = row[i]
                dst[2 * i] = table[byte & 15]
                dst[2 * i + 1] = table[byte >> 4]
            if whole < stop:
                dst[whole] = table[row[whole >> 1] & 15]


@numba.njit(**_OPTIONS)
def dequantize_rows_8bit(first, last, packed, scale, codebooks, zero, block_size, in_features, out):
    has_zero = zero.shape[0] > 0
    for r in range(first, last):
        codebook = codebooks[min(r, codebooks.shape[0] - 1)]
        row = packed[r]
        dst = out[r]
        for b in range(scale.shape[1]):
            s = scale[r, b]
            z = zero[r, b] * codebook[1] if has_zero else np.float32(0)
            for i in range(b * block_size, min((b + 1) * block_size, in_features)):
                dst[i] = (codebook[row[i]] + z) * s


DEQUANTIZE_ROWS = {
    2: dequantize_rows_2bit,
    3: dequantize_rows_3bit,
    4: dequantize_rows_4bit,
    8: dequantize_rows_8bit,
}
