"""What the host side of the Triton kernels shares: how operands are handed over, on which device, and tuning."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton runs kernels in Python on the CPU (``TRITON_INTERPRET=1`` before its import): for tests."""


def tuned(configs: list[triton.Config], key: list[str]) -> Callable[[Any], Any]:
    """Autotune over the configurations, once per ``key`` and kept on disk; the first of them where nothing can be timed."""
    if INTERPRETED:
        configs = configs[:1]
    return triton.autotune(configs=configs, key=key, cache_results=True)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it that of the tensor."""
    if tensor.device.type == "cpu":
        return nullcontext()
    return getattr(torch, tensor.device.type).device(tensor.device)


def processors(tensor: Tensor) -> int:
    """How many programs the device runs side by side, roughly."""
    if tensor.device.type == "cuda":
        return torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return 64


class Packed(NamedTuple):
    """A packed matrix as kernels take it, by words of 32 bits where every row starts at one, else by bytes.

    Attributes:
        units: (rows, units) int32 words or uint8 bytes.
        aligned: whether they are words.
        levels: (2^bits,) or (rows, 2^bits), any float dtype.
        zero: zero points, or the scales once more where there are none, which are not read.
    """

    units: Tensor
    aligned: bool
    scale: Tensor
    zero: Tensor
    levels: Tensor
    constants: dict[str, Any]


def handed_over(
    packed: Tensor, scale: Tensor, codebook: Tensor, zero: Tensor | None, bits: int, block_size: int
) -> Packed:
    """The operands of :func:`loftq.kernels.dequantize`, contiguous, with the compile-time constants that follow."""
    packed, scale, codebook = packed.contiguous(), scale.contiguous(), codebook.contiguous()
    aligned = packed.shape[1] % 4 == 0 and packed.data_ptr() % 4 == 0 and packed.storage_offset() % 4 == 0
    constants = {
        "BITS": bits,
        "BLOCK": block_size,
        "ALIGNED": aligned,
        "HAS_ZERO": zero is not None,
        "BY_ROW": codebook.dim() == 2,
    }
    units = packed.view(torch.int32) if aligned else packed
    return Packed(units, aligned, scale, scale if zero is None else zero.contiguous(), codebook, constants)
