"""Packed codes -> a dense matrix.

The layers write it to memory that exists; ``fresh`` allocates it, as bitsandbytes' functions and layers do on the CPU. Most of
that time the system spends on providing the pages, so bitsandbytes' loop is also called with memory that exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from loftq import kernels
from loftq.bench import rival
from loftq.bench.bounds import RIVAL
from loftq.bench.case import Case, Options
from loftq.bench.timing import in_turns
from loftq.codec import quantize
from loftq.config import BITS, QuantSpec

SUITE = "dequantize"
SIZE, QUICK_SIZE = 4096, 256


def title(options: Options) -> str:
    size = QUICK_SIZE if options.quick else SIZE
    return f"packed codes to a dense {size} × {size} matrix, blocks of 64, float16 scales"


def run(options: Options) -> Iterator[Case]:
    size = QUICK_SIZE if options.quick else SIZE
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    packed = {bits: quantize(weight, QuantSpec(bits)) for bits in BITS}
    if rival.version() is None:
        options.notice(rival.MISSING)
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.zeros(size, size, dtype=dtype)
        candidates: dict[str, Callable[[], Any]] = {}
        for bits, quantized in packed.items():
            tensors = quantized.tensors
            stored = (tensors["weight"].flatten(1), tensors["weight_scale"], tensors["weight_codebook"], None)
            shape = (bits, quantized.spec.block_size, size, dtype)
            candidates[f"{bits} bits"] = partial(kernels.dequantize, *stored, *shape, out)
            candidates[f"{bits} bits, fresh"] = partial(kernels.dequantize, *stored, *shape)
        if rival.version() is not None:
            candidates[RIVAL] = rival.dequantizer(weight.to(dtype))
            into = torch.zeros(size, size, dtype=dtype)
            if (existing := rival.dequantizer_into(weight.to(dtype), into)) is not None:
                candidates[f"{RIVAL}, existing memory"] = existing
        yield Case(
            SUITE,
            f"to {str(dtype).removeprefix('torch.')}",
            in_turns(candidates, options.repeats, seconds=options.seconds),
        )
