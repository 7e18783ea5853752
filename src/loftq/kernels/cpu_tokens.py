"""Products of many tokens with a packed matrix on the CPU: tokens in the order of :mod:`loftq.kernels.cpu_tiles` and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loftq.kernels.simd_tiles import BFLOAT16, HEIGHT, VECTORS
from loftq.kernels.threads import for_rows

_GROUP = 16 * VECTORS
_FEATURES = 16  # that a thread works on at least: a vector of codes


def _groups(tokens: int) -> Iterator[tuple[int, int, int]]:
    """(first token, groups, tokens of each) of parts whose groups are of one size; the last group may not be full."""
    padded = -(-tokens // 16) * 16
    many = padded // _GROUP
    if many:
        yield 0, many, _GROUP
    if padded > many * _GROUP:
        yield many * _GROUP, (padded - many * _GROUP) // 16, 16


def by_groups(x: Tensor) -> Tensor:
    """(tokens, k) -> (k * tokens,), of one group after the other ``[k, t]``; tokens are filled up to 16 with zeros."""
    tokens, length = x.shape
    flat = x.new_empty(-(-tokens // 16) * 16 * length)
    for first, groups, size in _groups(tokens):
        part = flat[first * length :][: groups * size * length].view(groups, length, size)
        missing = first + groups * size - tokens
        own = (
            torch.nn.functional.pad(x[first:], (0, 0, 0, missing)) if missing > 0 else x[first : first + groups * size]
        )
        part.copy_(own.view(groups, size, length).transpose(1, 2))
    return flat


def from_groups(flat: Tensor, padded: int, out: Tensor) -> Tensor:
    """The inverse: (padded * tokens,) -> the (tokens, features) of ``out``, in its dtype."""
    tokens, features = out.shape
    for first, groups, size in _groups(tokens):
        part = flat[first * padded :][: groups * size * padded].view(groups, padded, size)[:, :features].transpose(1, 2)
        whole = (tokens - first) // size
        out[first : first + whole * size].view(whole, size, features).copy_(part[:whole])
        if whole < groups:
            own = out[first + whole * size :]
            own.copy_(part[whole, : own.shape[0]])
    return out


def product(
    loop: Callable[..., Any], x: Tensor, features: int, stored: tuple[Any, ...], block_size: int, n: int
) -> Tensor:
    """(tokens, k) -> (tokens, features) by one of the loops.

    ``stored``: width, packed, scale, tables and zero as it takes them.
    """
    width, packed, *arrays = stored
    out = x.new_empty(x.shape[0], features)
    share: tuple[int, ...] = (0,)
    cells: np.dtype[Any] = np.dtype(np.float32)
    if x.dtype == torch.bfloat16 and BFLOAT16:
        share, cells = (0, 0), np.dtype(np.uint16)
        x = torch.nn.functional.pad(x, (0, x.shape[1] % 2)).contiguous().view(torch.int32)
    else:
        x = x.float().contiguous()
    padded = -(-features // HEIGHT) * HEIGHT
    sums = torch.zeros(-(-x.shape[0] // 16) * 16 * padded)
    given = (by_groups(x).numpy(), x.shape[1], np.empty(0, cells), sums.numpy(), padded)
    work = packed.shape[0] * n * (1 + x.shape[0] // 16)  # sixteen tokens take as long as writing the matrix does
    for_rows(loop, -(-features // _FEATURES), work, width, share, packed, *arrays, block_size, n, *given)
    return from_groups(sums, padded, out)
