"""What the host side of the Triton kernels shares: how operands are handed over, on which device, and tuning."""

from __future__ import annotations

import threading
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


class Tuned:
    """A kernel with the fastest of its configurations, measured once for each ``key`` and kept on disk by Triton's tuner.

    What the tuner and Triton find out about a call takes them longer than the launch. Here a call is recognised by all that
    they could look at, and what was compiled for it is launched: a third of the processor's time, of which a training step on
    a GPU has little between two products.
    """

    def __init__(self, tuner: Any) -> None:
        self.tuner = tuner
        self.known: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
        self._tuning = threading.Lock()  # the tuner holds state, and the backward pass has a thread of its own

    def __call__(self, grid: Callable[[Any], tuple[int, ...]], *args: Any, **constants: Any) -> None:
        """Launch ``grid(configuration)`` programs. The first argument is a tensor, the others are tensors or integers."""
        seen = [(a.dtype, a.data_ptr() % 16) if isinstance(a, Tensor) else a for a in args]
        call = (args[0].device, *seen, *constants.values())
        found = self.known.get(call)
        if found is not None:
            launch, rest = found
            launch(*args, *rest)
            return
        with self._tuning:
            compiled = self.tuner[grid](*args, **constants)
            config = self.tuner.best_config.all_kwargs()
        if compiled is not None:  # not by the interpreter
            values = {**constants, **config}
            rest = tuple(values[name] for name in self.tuner.arg_names[len(args) :])
            self.known[call] = (compiled[(*grid(config), 1, 1)[:3]], rest)


def tuned(configs: list[triton.Config], key: list[str]) -> Callable[[Any], Tuned]:
    """Measure the configurations once per ``key``, arguments by name; the first of them where nothing can be timed."""
    if INTERPRETED:
        configs = configs[:1]
    autotune = triton.autotune(configs=configs, key=key, cache_results=True)
    return lambda kernel: Tuned(autotune(kernel))


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it that of the tensor."""
    if tensor.device.type == "cpu":
        return nullcontext()
    devices = getattr(torch, tensor.device.type)
    return nullcontext() if devices.current_device() == tensor.device.index else devices.device(tensor.device)


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
    aligned = packed.shape[1] % unit == packed.data_ptr() % unit == packed.storage_offset() % unit == 0
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
