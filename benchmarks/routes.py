"""Which compiler for the loops on the CPU: plain torch, `torch.compile` or numba? The comparison behind `kernels/cpu.py`.

    python benchmarks/routes.py            # ten minutes on two cores, most of them compiling; needs a C++ compiler

The same three pieces of work by each: packed codes to a dense matrix, the search of every block's scale, and a product
with one token. `torch.compile` gets the reference, and for dequantizing and the product at 2 and 4 bits also a text that
suits it better: no 64-bit words, one lookup, nothing that is not one loop over the output. What is compared is checked to be
equal first. First calls include compiling, for `torch.compile` with an empty cache; numba has its loops from its cache on disk.

Then products of many tokens: pieces multiplied in registers (numba), tiles of the matrix that torch multiplies out of the
cache, and the whole matrix written and multiplied by torch.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common import save
from loftq.bench.timing import in_turns
from loftq.codec import quantize
from loftq.config import QuantSpec
from loftq.kernels import cpu, reference
from loftq.modules import ops

SIZE, BLOCK = 4096, 64
TOKENS = (64, 256, 512, 1024)
Work = Callable[[], Any]


def one_loop(packed: Tensor, scale: Tensor, codebook: Tensor, bits: int) -> Tensor:
    """Dequantize at 2 and 4 bits, where every byte holds whole codes, to float32."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    codes = (packed[:, :, None] >> shifts) & ((1 << bits) - 1)
    blocks = codebook[codes.int()].view(packed.shape[0], -1, BLOCK)
    return (blocks * scale.float()[:, :, None]).view(packed.shape[0], -1)


def one_loop_into(out: Tensor, packed: Tensor, scale: Tensor, codebook: Tensor, bits: int) -> Tensor:
    return out.copy_(one_loop(packed, scale, codebook, bits))


def one_loop_product(x: Tensor, packed: Tensor, scale: Tensor, codebook: Tensor, bits: int) -> Tensor:
    """Multiply and sum instead of a matrix product, so that the matrix need not be written."""
    return (one_loop(packed, scale, codebook, bits) * x).sum(1)[None]


def routes(bits: int, weight: Tensor) -> dict[str, dict[str, Work]]:
    """piece of work -> route -> call."""
    packed_weight = quantize(weight, QuantSpec(bits))
    tensors = packed_weight.tensors
    packed, scale, codebook = tensors["weight"].flatten(1), tensors["weight_scale"], tensors["weight_codebook"].float()
    thresholds = (codebook[1:] + codebook[:-1]) / 2
    stored = (packed, scale, codebook, None, bits, BLOCK)
    x = torch.randn(1, SIZE, generator=torch.Generator().manual_seed(1))
    factors = torch.linspace(0.5, 1.1, 16)
    blocks = (weight, torch.ones(SIZE), codebook, thresholds, factors, 1, BLOCK)
    compiled = {
        name: torch.compile(function, dynamic=False, fullgraph=True)
        for name, function in (
            ("dequantize", reference.dequantize),
            ("product", reference.product),
            ("search", reference.search_scale),
            ("one loop", one_loop_into),
            ("one loop product", one_loop_product),
        )
    }
    work: dict[str, dict[str, Work]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.zeros(SIZE, SIZE, dtype=dtype)  # written to by all: a fresh matrix costs more than what is compared
        own = work[f"dequantize to {str(dtype).removeprefix('torch.')}"] = {
            "numba": partial(cpu.dequantize, *stored, SIZE, dtype, out),
            "torch.compile": partial(compiled["dequantize"], *stored, SIZE, dtype, out),
            "torch": partial(reference.dequantize, *stored, SIZE, dtype, out),
        }
        if bits != 3:
            own["torch.compile, one loop"] = partial(compiled["one loop"], out, packed, scale, codebook, bits)
    work["one token"] = {
        "numba": partial(cpu.product, x, *stored),
        "torch.compile": partial(compiled["product"], x, *stored),
        "torch": partial(reference.product, x, *stored),
    }
    if bits != 3:
        work["one token"]["torch.compile, one loop"] = partial(
            compiled["one loop product"], x, packed, scale, codebook, bits
        )
    work["scale search"] = {
        "numba": partial(cpu.search_scale, *blocks),
        "torch.compile": partial(compiled["search"], *blocks),
        "torch": partial(reference.search_scale, *blocks),
    }
    return work


def token_routes(bits: int, weight: Tensor) -> dict[str, dict[str, Work]]:
    tensors = quantize(weight, QuantSpec(bits)).tensors
    codebook = tensors["weight_codebook"].float()
    matrix = (tensors["weight"].flatten(1), tensors["weight_scale"], codebook, None, bits, BLOCK)
    work: dict[str, dict[str, Work]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        whole = torch.empty(SIZE, SIZE, dtype=dtype)
        for tokens in TOKENS:
            x = torch.randn(tokens, SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)
            work[f"{tokens} tokens, {str(dtype).removeprefix('torch.')}"] = {
                "numba, pieces": partial(cpu.product, x, *matrix),
                "tiles through torch": partial(ops._times_transposed, x, matrix),
                "torch": partial(whole_matrix, x, matrix, whole),
            }
    return work


def whole_matrix(x: Tensor, matrix: tuple[Any, ...], memory: Tensor) -> Tensor:
    return x @ cpu.dequantize(*matrix, SIZE, x.dtype, memory).T


def first_call(route: Work) -> tuple[float, Tensor]:
    started = time.perf_counter()
    result: Tensor = route()
    return time.perf_counter() - started, result


def main() -> None:
    torch._dynamo.config.recompile_limit = 64
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    rows = []
    for bits in (2, 3, 4):
        for name, work in {**routes(bits, weight), **token_routes(bits, weight)}.items():
            expected = work["torch"]().float().clone()
            seconds_to_compile = {}
            for route, call in work.items():
                seconds_to_compile[route], found = first_call(call)
                # Sums in another order: a scale may be a neighbouring candidate's where two are equally good.
                error = ((found.float() - expected).norm() / expected.norm()).item()
                allowed = 1e-2 if name == "scale search" or "tokens, bfloat16" in name else 1e-5
                assert error < allowed, (name, route, error)
            for route, seconds in in_turns(work, 7, seconds=2.0).items():
                median = sorted(seconds)[len(seconds) // 2]
                row = {"bits": bits, "work": name, "route": route, "seconds": seconds}
                rows.append({**row, "median": median, "first_call_seconds": round(seconds_to_compile[route], 2)})
                first = f"first call {seconds_to_compile[route]:.1f} s"
                print(f"{bits} bits  {name:24} {route:26} {median * 1e3:8.2f} ms  {first}", flush=True)
    save("routes", "python benchmarks/routes.py", {"size": SIZE, "rows": rows})


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        main()
