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


EXACT = {"enable_fp_fusion": False}
"""Launch option: no fused multiply-add, so that results are rounded as they are on the CPU."""


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


# What eight codes of so many bits are read as, where rows start at whole ones; 3-bit groups straddle 32-bit words.
_UNITS = {2: torch.int16, 3: torch.int32, 4: torch.int32, 8: torch.int64}


def units_of(packed: Tensor, bits: int) -> tuple[Tensor, bool]:
    """(rows, length) packed rows by the units of their width, and whether that was possible; by bytes otherwise."""
    packed, unit = packed.contiguous(), _UNITS[bits].itemsize
    aligned = all(x % unit == 0 for x in (packed.shape[1], packed.data_ptr(), packed.storage_offset()))
    return (packed.view(_UNITS[bits]) if aligned else packed), aligned


class Packed(NamedTuple):
    """A packed matrix as kernels take it.

    Attributes:
        operands: packed rows, see :func:`units_of`; scales; zero points, or the scales once more where there are none, which
            are not read; levels (2^bits,) or (rows, 2^bits), any float dtype.
        sizes: units of a row, blocks of a row.
        constants: known at compile time.
    """

    operands: tuple[Tensor, Tensor, Tensor, Tensor]
    sizes: tuple[int, int]
    constants: dict[str, Any]


def handed_over(
    packed: Tensor, scale: Tensor, codebook: Tensor, zero: Tensor | None, bits: int, block_size: int
) -> Packed:
    """The operands of :func:`loftq.kernels.dequantize`, contiguous, with the compile-time constants that follow."""
    units, aligned = units_of(packed, bits)
    scale, codebook = scale.contiguous(), codebook.contiguous()
    if codebook.data_ptr() % min(64, codebook.shape[-1] * codebook.element_size()):
        codebook = codebook.clone()  # memory of its own starts at a multiple of 64 bytes, as load_levels needs
    constants = {
        "BITS": bits,
        "BLOCK": block_size,
        "ALIGNED": aligned,
        "HAS_ZERO": zero is not None,
        "BY_ROW": codebook.dim() == 2,
    }
    operands = (units, scale, scale if zero is None else zero.contiguous(), codebook)
    return Packed(operands, (units.shape[1], scale.shape[1]), constants)
