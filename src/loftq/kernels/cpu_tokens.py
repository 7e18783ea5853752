"""Products of many tokens with a packed matrix on the CPU, by the loops of :mod:`loftq.kernels.cpu_tiles`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loftq.kernels import TOKENS_AT_ONCE
from loftq.kernels.cpu_tiles import group_columns, ungroup_columns
from loftq.kernels.simd_tiles import BFLOAT16, HEIGHT
from loftq.kernels.threads import for_rows

BITS_AS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}
"""dtype -> the one that compiled loops know its numbers by."""


def product(
    loop: Callable[..., Any], x: Tensor, features: int, stored: tuple[Any, ...], block_size: int, n: int
) -> Tensor:
    """(tokens, k) -> (tokens, features) by one of the loops, :data:`loftq.kernels.TOKENS_AT_ONCE` at a time.

    ``stored``: width, packed, scale, tables and zero as it takes them.
    """
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[0], features)
    out = x.new_empty(x.shape[0], features)
    for part, found in zip(x.split(TOKENS_AT_ONCE), out.split(TOKENS_AT_ONCE), strict=True):
        _product(loop, part, found, stored, block_size, n)
    return out


def _product(
    loop: Callable[..., Any], x: Tensor, out: Tensor, stored: tuple[Any, ...], block_size: int, n: int
) -> None:
    width, packed, *arrays = stored
    features = out.shape[1]
    share: tuple[int, ...] = (0,)
    cells: np.dtype[Any] = np.dtype(np.float32)
    if x.dtype == torch.bfloat16 and BFLOAT16:
        share, cells = (0, 0), np.dtype(np.uint16)
        padded_x = torch.nn.functional.pad(x, (0, x.shape[1] % 2))
        x = padded_x.flatten().view(torch.int32).view(len(x), -1)  # flat first: a single row's stride may be anything
    else:
        x = x.float().contiguous()
    tokens, length = x.shape
    tokens = -(-tokens // 16) * 16
    padded = -(-features // HEIGHT) * HEIGHT
    grouped, sums = x.new_empty(tokens * length), torch.zeros(tokens * padded, dtype=torch.float32, device="cpu")
    for_rows(group_columns, -(-length // 16), x.numel(), x.numpy(), grouped.numpy())
    given = (grouped.numpy(), length, np.empty(0, cells), sums.numpy(), padded)
    work = packed.shape[0] * n * (1 + tokens // 16)  # sixteen tokens take as long as writing the matrix does
    for_rows(loop, -(-features // 16), work, width, share, packed, *arrays, block_size, n, *given)
    for_rows(
        ungroup_columns, -(-features // 16), out.numel(), sums.numpy(), padded, out.view(BITS_AS[out.dtype]).numpy()
    )
