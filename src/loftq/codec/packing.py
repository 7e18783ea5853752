"""k-bit codes <-> bytes.

Each row is a little-endian bit stream that starts at a byte: code i of a row occupies bits i*k ... i*k + k - 1, bit 0
being the lowest of byte 0. So 4 codes of 2 bits share a byte (the first in the lowest bits), 8 codes of 3 bits take 3
bytes, and a row takes ceil(n*k / 8) bytes: less than one byte of padding a row, whatever the length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loftq import kernels
from loftq.config import BITS, one_of
from loftq.errors import WeightError
from loftq.kernels import packed_row_bytes

__all__ = ["pack", "packed_row_bytes", "unpack"]


def pack(codes: Tensor, bits: int) -> Tensor:
    """(rows, n) uint8 codes below 2^bits -> (rows, ceil(n * bits / 8)) uint8.

    Raises:
        WeightError: if codes are not a two-dimensional uint8 tensor.
    """
    one_of("bits", bits, BITS)
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise WeightError(f"codes are {codes.dtype} of shape {tuple(codes.shape)}, expected uint8 of shape (rows, n)")
    return kernels.pack(codes, bits)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """(rows, ceil(n * bits / 8)) uint8 -> (rows, n) uint8 codes.

    Raises:
        WeightError: if the bytes do not hold exactly n codes a row.
    """
    one_of("bits", bits, BITS)
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != packed_row_bytes(n, bits):
        raise WeightError(
            f"packed codes are {packed.dtype} of shape {tuple(packed.shape)}, expected uint8 with "
            f"{packed_row_bytes(n, bits)} bytes a row for {n} codes of {bits} bits"
        )
    return kernels.unpack(packed, bits, n)
