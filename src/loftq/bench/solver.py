"""``decompose`` with default settings, and what it saves over a whole SVD a step at half the width.

The errors of both are cases of their own: speed is worth nothing at another error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loftq.bench.bounds import EXACT
from loftq.bench.case import RELATIVE, Case, Options
from loftq.bench.timing import in_turns
from loftq.config import PUBLISHED, QuantSpec
from loftq.solver import decompose

SUITE = "solver"
SIZE, QUICK_SIZE = 4096, 640
RANK, STEPS = 64, 5
WIDTHS = (2, 4)


def _size(options: Options) -> int:
    return QUICK_SIZE if options.quick else SIZE


def title(options: Options) -> str:
    size = _size(options)
    return f"decompose a random {size} × {size} matrix, and one of half the width, rank {RANK}, T = {STEPS}"


def run(options: Options) -> Iterator[Case]:
    size = _size(options)
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    half = weight[: size // 2, : size // 2].contiguous()
    for bits in WIDTHS:
        work: dict[str, Callable[[], Any]] = {"default": partial(_decompose, weight, QuantSpec(bits), "auto")}
        yield Case(SUITE, f"decompose, {bits} bits", in_turns(work, options.repeats, seconds=options.seconds))
    svd = {"LAPACK": partial(torch.linalg.svd, half, full_matrices=False)}
    yield Case(SUITE, "half the width, one SVD", in_turns(svd, options.repeats, seconds=options.seconds))
    for bits in WIDTHS:
        for quantizer, fields in {"": {}, ", published quantizer": PUBLISHED}.items():
            name = f"half the width, {bits} bits{quantizer}"
            errors: dict[str, tuple[float, ...]] = {}
            spec = QuantSpec(bits, **fields)
            work = {n: _noting(errors, n, half, spec, svd) for n, svd in {"default": "auto", EXACT: "exact"}.items()}
            work["default"]()  # compiles; the exact one has nothing left to warm up and takes its time
            yield Case(SUITE, name, in_turns(work, options.repeats, seconds=options.seconds, warm_up=False))
            yield Case(SUITE, f"{name}, error", errors, RELATIVE)


def _decompose(weight: Tensor, spec: QuantSpec, svd: str) -> float:
    return decompose(weight, spec, rank=RANK, num_iter=STEPS, svd=svd).error


def _noting(
    errors: dict[str, tuple[float, ...]], name: str, weight: Tensor, spec: QuantSpec, svd: str
) -> Callable[[], Any]:
    """The work, which also leaves its error, the same every time, under its name."""

    def work() -> None:
        errors[name] = (_decompose(weight, spec, svd),)

    return work
