"""Compiled CPU loops between one code a byte and the packed bit stream (see ``codec.packing`` for the layout)."""

import numba
import numpy as np

_OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy"}


@numba.njit(**_OPTIONS)
def pack_rows(first, last, codes, bits, packed):
    in_features = codes.shape[1]
    for r in range(first, last):
        word = np.uint32(0)
        filled = 0
        at = 0
        for i in range(in_features):
            word |= np.uint32(codes[r, i]) << np.uint32(filled)
            filled += bits
            if filled >= 8:
                packed[r, at] = word & np.uint32(255)
                at += 1
                word >>= np.uint32(8)
                filled -= 8
        if filled > 0:
            packed[r, at] = word & np.uint32(255)


@numba.njit(**_OPTIONS)
def unpack_rows(first, last, packed, bits, codes):
    mask = np.uint32((1 << bits) - 1)
    for r in range(first, last):
        word = np.uint32(0)
        filled = 0
        at = 0
        for i in range(codes.shape[1]):
            if filled < bits:
                word |= np.uint32(packed[r, at]) << np.uint32(filled)
                at += 1
                filled += 8
            codes[r, i] = word & mask
            word >>= np.uint32(bits)
            filled -= bits
