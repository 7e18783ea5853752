"""Where the tests of the Triton kernels run: on the GPU, or without one in Triton's interpreter (see tests/conftest.py)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loftq import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def moved(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return type(value)(moved(v, device) for v in value) if type(value) in (tuple, list) else value


def by_triton(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A function of :mod:`loftq.kernels`, or one that calls them, by Triton; tensors in and out are on the CPU."""
    with kernels._only("triton_kernels"):
        return moved(function(*moved(args, DEVICE), **{k: moved(v, DEVICE) for k, v in options.items()}), "cpu")


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 numbers as the kernels store them: the interpreter cuts bfloat16 off where a GPU rounds to nearest even."""
    if INTERPRETED and dtype == torch.bfloat16:
        value = (value.view(torch.int32) & ~0xFFFF).view(torch.float32)
    return value.to(dtype)
