"""Compile every Triton kernel for a GPU that need not be there: ``python tests/kernels/compile_triton.py cuda 90``.

The launching code runs as it is, on CPU tensors; each launch compiles and nothing is launched. Prints one line of JSON:
kernels compiled, and those that spill registers.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from loftq import kernels
from loftq.codec.codebook import codebook, thresholds


class Absent:
    """A driver that knows which GPU to compile for."""

    def __init__(self, target: GPUTarget) -> None:
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


compiled: list[tuple[str, Any, dict[str, Any]]] = []


def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    shown = {k: v for k, v in options.items() if isinstance(v, (bool, int))}
    compiled.append((self.__name__, launch(self, *args, grid=grid, warmup=True, **options), shown))


def every_configuration(self: Autotuner, *args: Any, **options: Any) -> None:
    for config in self.configs if FULL else self.configs[:1]:
        self.fn.run(*args, **options, **config.all_kwargs())
    self.best_config = self.configs[0]


def codes_and_products(bits: int, dtype: torch.dtype, with_zero: bool, by_row: bool, n: int) -> None:
    rows, block_size = 64, 64
    levels = codebook("uniform" if with_zero else "nf", bits)
    levels = levels.expand(rows, -1).contiguous().bfloat16() if by_row else levels
    scale = torch.ones(rows, -(-n // block_size), dtype=torch.float16)
    packed = torch.zeros(rows, kernels.packed_row_bytes(n, bits), dtype=torch.uint8)
    operands = (packed, scale, levels, scale if with_zero else None, bits, block_size)
    kernels.dequantize(*operands, n, dtype)
    for tokens in (1, 16):
        kernels.product(torch.ones(tokens, n, dtype=dtype), *operands)
    kernels.grad_product(torch.ones(16, rows, dtype=dtype), *operands, n)


def rounding(bits: int, with_zero: bool, by_row: bool) -> None:
    rows, n, block_size = 64, 128, 64
    levels = codebook("uniform" if with_zero else "nf", bits)
    levels = levels.expand(rows, -1).contiguous() if by_row else levels
    weight, scale, square = torch.ones(rows, n), torch.ones(rows, 2), torch.eye(n)
    codes, borders, factors = torch.zeros(rows, n, dtype=torch.uint8), thresholds(levels), torch.ones(3)
    zero = scale if with_zero else None
    constants = (scale, zero, levels, borders, block_size)
    kernels.unpack(kernels.pack(codes, bits), bits, n)
    kernels.encode(weight, scale, zero, levels, borders, block_size)
    if with_zero:
        kernels.search_affine(weight, levels, borders, factors, 1, block_size)
    else:
        kernels.search_scale(weight, levels, borders, factors, 1, block_size)
    kernels.level_moments(weight, scale, codes, 2**bits, block_size)
    kernels.feedback(weight, square, torch.arange(n), *constants, (0, 64), codes, weight)
    for refit in (False, True):
        kernels.descend(weight, square, *constants, codes, weight, 1, refit)


if __name__ == "__main__":
    FULL = "--full" in sys.argv
    backend, architecture = sys.argv[1], sys.argv[2]
    target = GPUTarget(
        backend, int(architecture) if backend == "cuda" else architecture, 32 if backend == "cuda" else 64
    )
    driver.set_active(Absent(target))
    launch = JITFunction.run
    JITFunction.run, Autotuner.run = compile_only, every_configuration
    with kernels._only("triton_kernels"):
        for bits in (2, 3, 4, 8):
            codes_and_products(bits, torch.bfloat16, False, False, 256)
            rounding(bits, False, False)
        codes_and_products(4, torch.float32, True, False, 251)
        codes_and_products(3, torch.float16, False, True, 251)
        rounding(3, True, False)
        rounding(3, False, True)
    count = Counter(name for name, _, _ in compiled)
    print(json.dumps({"kernels": dict(count), "triton": triton.__version__}))
