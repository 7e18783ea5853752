"""Truncated SVD: exact, and by block power iteration close enough to it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loftq.codec import quantize
from loftq.config import PUBLISHED, QuantSpec
from loftq.solver.lowrank import LowRank, block_power_svd, exact_svd, truncated_svd

pytestmark = pytest.mark.usefixtures("one_thread")


def gaussian(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def dense(lowrank: LowRank) -> Tensor:
    return (lowrank.U.double() * lowrank.S.double()) @ lowrank.Vh.double()


def error(matrix: Tensor, lowrank: LowRank) -> float:
    return float((matrix.double() - dense(lowrank)).norm())


def best_error(matrix: Tensor, rank: int) -> float:
    """Eckart and Young: what remains are the singular values beyond the rank."""
    return float(torch.linalg.svdvals(matrix.double())[rank:].norm())


@pytest.mark.parametrize("method", ["exact", "block", "auto"])
@pytest.mark.parametrize(
    ("m", "n", "rank"), [(1, 1, 1), (1, 9, 1), (9, 1, 1), (40, 30, 30), (30, 40, 7), (250, 210, 5)]
)
def test_shapes_and_orthonormal_factors(m, n, rank, method):
    matrix = gaussian(m, n)
    lowrank = truncated_svd(matrix, rank, method=method)
    assert lowrank.U.shape == (m, rank)
    assert lowrank.S.shape == (rank,)
    assert lowrank.Vh.shape == (rank, n)
    assert bool((lowrank.S.diff() <= 0).all()), "singular values must descend"
    for name, gram in (("U", lowrank.U.T @ lowrank.U), ("V", lowrank.Vh @ lowrank.Vh.T)):
        distance = (gram - torch.eye(rank)).abs().max().item()
        assert distance <= 1e-4, f"{name} is {distance:.1e} from orthonormal"  # float32 Gram-Schmidt on 250 rows


@pytest.mark.parametrize(("m", "n", "rank"), [(30, 40, 7), (40, 30, 30), (300, 200, 16)])
def test_exact_is_the_best_approximation(m, n, rank):
    matrix = gaussian(m, n)
    found, best = error(matrix, exact_svd(matrix, rank)), best_error(matrix, rank)
    assert found == pytest.approx(best, rel=1e-5, abs=1e-5 * float(matrix.norm()))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name", ["attention.self.query", "intermediate.dense", "output.dense"])
def test_block_power_on_quantization_residuals(minilm_layer2, name, bits):
    # almost white noise: the flattest spectrum, the hardest case for the iteration
    weight = minilm_layer2[name]
    residual = weight - quantize(weight, QuantSpec(bits, **PUBLISHED)).dequantize()
    best = best_error(residual, 32)
    cold = block_power_svd(residual, 32)
    assert error(residual, cold) <= 1.003 * best, f"cold: {error(residual, cold) / best - 1:.3%} above the best"
    nearby = residual + 0.1 * residual.std() * gaussian(*residual.shape)
    warm = block_power_svd(nearby, 32, basis=cold.basis)
    ratio = error(nearby, warm) / best_error(nearby, 32)
    assert ratio <= 1.003, f"warm: {ratio - 1:.3%} above the best"


def test_warm_start_is_better_than_as_many_passes_from_a_cold_one():
    matrix = gaussian(300, 250)
    basis = block_power_svd(matrix, 16).basis
    warm, cold = (
        error(matrix, block_power_svd(matrix, 16, basis=basis, passes=2)),
        error(matrix, block_power_svd(matrix, 16, passes=2)),
    )
    assert warm < cold, (warm, cold)


def test_error_follows_from_the_energy():
    # the approximation is the matrix times an orthogonal projector: Pythagoras
    matrix = gaussian(260, 220)
    lowrank = block_power_svd(matrix, 16)
    expected = (float(matrix.double().square().sum()) - lowrank.energy) ** 0.5
    assert error(matrix, lowrank) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("method", ["exact", "block"])
def test_low_rank_matrix_is_recovered(method):
    matrix = gaussian(240, 5, 1) @ gaussian(5, 220, 2)
    lowrank = truncated_svd(matrix, 16, method=method)
    ratio = error(matrix, lowrank) / float(matrix.norm())
    assert ratio <= 2e-6, f"relative error {ratio:.1e}"
    balanced = (lowrank.U * lowrank.S.sqrt()).abs().max().item()
    assert balanced <= 2 * float(matrix.norm()) ** 0.5, f"largest element of U sqrt(S) {balanced:.1e}"


@pytest.mark.parametrize("method", ["exact", "block"])
def test_zero_matrix(method):
    lowrank = truncated_svd(torch.zeros(220, 210), 8, method=method)
    assert torch.equal(dense(lowrank), torch.zeros(220, 210, dtype=torch.float64))


def test_auto_is_exact_for_small_matrices_and_large_ranks():
    small, thick, large = gaussian(192, 400), gaussian(300, 300), gaussian(300, 300)
    assert truncated_svd(small, 8).basis is None
    assert truncated_svd(thick, 90).basis is None
    assert truncated_svd(large, 16).basis is not None


def test_same_seed_same_result():
    matrix = gaussian(250, 230)
    first, again, other = (block_power_svd(matrix, 8, passes=1, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in ("U", "S", "Vh", "basis"))
    assert not torch.equal(first.S, other.S)
