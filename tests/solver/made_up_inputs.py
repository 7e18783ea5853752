"""Random matrices with statistics of random inputs, and what every decomposition of them must fulfil."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from loftq.config import METHODS
from loftq.solver import Decomposition
from loftq.solver.importance import InputStatistics


def gaussian(rows: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))


def statistics_for(rows: int, n: int, seed: int = 0, *, diagonal: bool = False) -> InputStatistics:
    x = (gaussian(3 * n + 5, n, seed + 1) + gaussian(3 * n + 5, 1, seed + 2)) * torch.exp(
        0.5 * gaussian(1, n, seed + 3)
    )
    moment = x.T @ x / len(x)
    return InputStatistics(
        moment.diagonal().clone() if diagonal else moment,
        mean_abs=x.abs().mean(0),
        tokens=len(x),
        fisher_rows=gaussian(rows, 1, seed + 4)[:, 0].abs() + 0.1,
        fisher_columns=x.abs().mean(0) + 0.05,
    )


def true_dense(result: Decomposition) -> Tensor:
    """Float64 Q + scaling B A."""
    product = result.lora_B.double() @ result.lora_A.double()
    return result.quantized.dequantize().double() + result.scaling * product


def true_error(weight: Tensor, result: Decomposition) -> float:
    norm = float(weight.double().norm())
    return float((weight.double() - true_dense(result)).norm()) / (norm or 1.0)


def same(a: Decomposition, b: Decomposition) -> bool:
    tensors = [(a.lora_A, b.lora_A), (a.lora_B, b.lora_B)]
    tensors += [(t, b.quantized.tensors[n]) for n, t in a.quantized.tensors.items()]
    return all(torch.equal(x, y) for x, y in tensors)


def assert_sound(weight: Tensor, result: Decomposition, rank: int) -> None:
    assert result.lora_A.shape == (rank, weight.shape[1])
    assert result.lora_B.shape == (weight.shape[0], rank)
    assert bool(result.lora_A.isfinite().all())
    assert bool(result.lora_B.isfinite().all())
    assert len(result.errors) == len(result.objectives)
    assert all(map(math.isfinite, [*result.errors, *result.objectives]))
    assert result.method in METHODS
    # float32: a few roundings of a number up to 1, more where the adapter is much larger than the weight
    size = 1 + float((result.scaling * result.lora_B.double() @ result.lora_A.double()).norm() / weight.double().norm())
    assert true_error(weight, result) == pytest.approx(result.error, abs=2e-6 * size)
