"""Every named method against its equations, in float64 and written independently: tests/transcription_gptq.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import transcription
import transcription_gptq as reference
from loftq.codec import quantize
from loftq.config import METHODS as NAMES
from loftq.config import PUBLISHED, QuantSpec
from loftq.solver import Decomposition, decompose
from loftq.solver.importance import InputStatistics
from loftq.solver.methods import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")

SQUARE = "attention.self.value"
RANK = 16
WEIGHTS = [SQUARE, "intermediate.dense"]
CLOQ = 0.01  # of the mean diagonal

FEW = 256  # rows, where the transcription takes long

weights = pytest.mark.parametrize("name", WEIGHTS)
widths = pytest.mark.parametrize("bits", [2, 4], ids=["2bit", "4bit"])


def dense_of(result: Decomposition) -> np.ndarray:
    return (
        result.quantized.dequantize().double() + result.scaling * result.lora_B.double() @ result.lora_A.double()
    ).numpy()


def product_of(result: Decomposition) -> np.ndarray:
    return (result.scaling * result.lora_B.double() @ result.lora_A.double()).numpy()


def assert_adapter(result: Decomposition, expected: np.ndarray, tolerance: float = 2e-3) -> None:
    """Singular vectors of float32 matrices: their error grows with the inverse gap between singular values."""
    ratio = np.linalg.norm(product_of(result) - expected) / np.linalg.norm(expected)
    assert ratio <= tolerance, f"adapters differ by {ratio:.1e} of themselves"


def assert_reported(result: Decomposition, weight: Tensor, H: np.ndarray, expected: np.ndarray | None = None) -> None:
    """The objective that the result reports is the one of what it holds (and of what was expected)."""
    found = reference.objective(weight.double().numpy(), dense_of(result), H)
    assert result.objective == pytest.approx(found, rel=1e-4)
    assert result.objective == result.objectives[result.best_iter]
    if expected is not None:
        assert found == pytest.approx(reference.objective(weight.double().numpy(), expected, H), rel=1e-4)


def diagonal_of(statistics: InputStatistics) -> np.ndarray:
    return np.diag(statistics.second_moment.double().numpy()).copy()


def test_table_lists_every_method_once():
    assert tuple(METHODS) == NAMES
    for name, method in METHODS.items():
        assert method.source, name
        assert set(method.candidates) <= set(NAMES) - {name}, name


# --- no adapter ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rtn", "qlora", "gptq"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_methods_without_adapter(minilm_layer2, minilm_statistics, name, method):
    weight = minilm_layer2[name]
    result = decompose(weight, QuantSpec(2), rank=RANK, method=method, importance=minilm_statistics[name])
    assert torch.equal(result.lora_B, torch.zeros(len(weight), RANK))
    assert float(result.lora_A.abs().max()) <= weight.shape[1] ** -0.5
    assert float(result.lora_A.std()) == pytest.approx((3 * weight.shape[1]) ** -0.5, rel=0.05)
    if method != "gptq":
        assert torch.equal(result.quantized.dequantize(), quantize(weight, QuantSpec(2)).dequantize())


@widths
@weights
def test_gptq(minilm_layer2, minilm_statistics, name, bits):
    weight, statistics = minilm_layer2[name][:FEW], minilm_statistics[name]
    H = reference.damped(statistics.second_moment.double().numpy(), CLOQ)
    W = weight.double().numpy()
    Q, _ = reference.gptq(W, H, reference.absmax_grid(W, bits), reference.act_order(H))
    result = decompose(weight, QuantSpec(bits, **PUBLISHED), rank=RANK, method="gptq", importance=statistics)
    different = np.mean(np.abs(dense_of(result) - Q) > 1e-5)
    assert different < 0.02, f"{different:.2%} of the elements round to another level"  # rows that met a tie
    # those rows round otherwise, not worse
    assert result.objective == pytest.approx(reference.objective(W, Q, H), rel=2e-3)
    assert_reported(result, weight, H)
    assert result.best_iter == 1
    assert len(result.errors) == 2


# --- round to nearest, then correct --------------------------------------------------------------------------------


@pytest.mark.parametrize("svd", ["auto", "exact"])
def test_qera_with_the_identity_is_one_step_of_loftq(minilm_layer2, svd):
    weight = minilm_layer2["attention.self.query"]
    loftq = decompose(weight, QuantSpec(2), rank=RANK, num_iter=1, method="loftq", svd=svd)
    qera = decompose(weight, QuantSpec(2), rank=RANK, method="qera", importance=torch.eye(384), svd=svd)
    assert torch.equal(loftq.lora_A, qera.lora_A)
    assert torch.equal(loftq.lora_B, qera.lora_B)
    assert all(torch.equal(t, qera.quantized.tensors[n]) for n, t in loftq.quantized.tensors.items())
    # of loftq both are what the SVD's energy leaves; qera's weight error is measured, in float32
    assert qera.errors == pytest.approx(loftq.errors, rel=1e-6)
    assert qera.objectives == pytest.approx(loftq.objectives, rel=1e-6)


@widths
@weights
def test_qera(minilm_layer2, minilm_statistics, name, bits):
    weight, statistics = minilm_layer2[name], minilm_statistics[name]
    W, H = weight.double().numpy(), statistics.second_moment.double().numpy()
    Q = transcription.quantize(W, bits)
    L = reference.low_rank(W - Q, RANK, H)
    spec = QuantSpec(bits, **PUBLISHED)
    result = decompose(weight, spec, rank=RANK, method="qera", importance=statistics, svd="exact")
    assert_reported(result, weight, H, Q + L)
    assert_adapter(result, L)
    assert result.errors[1] == pytest.approx(np.linalg.norm(W - Q - L) / np.linalg.norm(W), rel=1e-4)


@widths
@pytest.mark.parametrize("method", ["qera-approx", "lqer"])
@weights
def test_diagonal_scalings(minilm_layer2, minilm_statistics, name, method, bits):
    weight, statistics = minilm_layer2[name], minilm_statistics[name]
    W = weight.double().numpy()
    S = np.sqrt(diagonal_of(statistics)) if method == "qera-approx" else statistics.mean_abs.double().numpy()
    Q = transcription.quantize(W, bits)
    U, sigma, Vt = np.linalg.svd((W - Q) * S, full_matrices=False)
    L = (U[:, :RANK] * sigma[:RANK]) @ Vt[:RANK] / S
    spec = QuantSpec(bits, **PUBLISHED)
    result = decompose(weight, spec, rank=RANK, method=method, importance=statistics, svd="exact")
    assert_reported(result, weight, np.diag(S**2), Q + L)
    assert_adapter(result, L)


def test_srr_chooses_among_shares_of_the_rank(minilm_layer2, minilm_statistics):
    weight, statistics = minilm_layer2[SQUARE], minilm_statistics[SQUARE]
    W, H = weight.double().numpy(), statistics.second_moment.double().numpy()
    expected = [reference.objective(W, transcription.quantize(W, 2), H)]
    for kept in (0, 4, 8, 12, 16):
        L = reference.low_rank(W, kept, H) if kept else np.zeros_like(W)
        Q = transcription.quantize(W - L, 2)
        if kept < RANK:
            L = L + reference.low_rank(W - L - Q, RANK - kept, H)
        expected.append(reference.objective(W, Q + L, H))
    spec = QuantSpec(2, **PUBLISHED)
    result = decompose(weight, spec, rank=RANK, method="srr", importance=statistics, svd="exact")
    assert result.objectives == pytest.approx(expected, rel=1e-4)
    assert result.objective == min(result.objectives)
    assert_reported(result, weight, H)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("rank", [1, 3, 16])
def test_srr_is_never_worse_than_qera(minilm_layer2, minilm_statistics, name, rank):
    weight, statistics = minilm_layer2[name], minilm_statistics[name]
    srr, qera = (
        decompose(weight, QuantSpec(2), rank=rank, method=method, importance=statistics) for method in ("srr", "qera")
    )
    assert srr.objectives[:2] == pytest.approx(qera.objectives, rel=1e-6)  # nothing kept is qera
    assert srr.objective <= qera.objective * (1 + 1e-6)


# --- error feedback, then correct ----------------------------------------------------------------------------------


@widths
@weights
def test_cloq(minilm_layer2, minilm_statistics, name, bits):
    weight, statistics = minilm_layer2[name][:FEW], minilm_statistics[name]
    H = reference.damped(statistics.second_moment.double().numpy(), CLOQ)
    W = weight.double().numpy()
    Q, _ = reference.gptq(W, H, reference.absmax_grid(W, bits), reference.act_order(H))
    spec = QuantSpec(bits, **PUBLISHED)
    result = decompose(weight, spec, rank=RANK, method="cloq", importance=statistics, svd="exact")
    # the adapter for the backbone as it is, some of whose rows met a tie
    found = result.quantized.dequantize().double().numpy()
    assert np.mean(np.abs(found - Q) > 1e-5) < 0.02
    L = reference.low_rank(W - found, RANK, H)
    assert_adapter(result, L)
    assert_reported(result, weight, H, found + L)
    L = reference.low_rank(W - Q, RANK, H)
    assert result.objective == pytest.approx(reference.objective(W, Q + L, H), rel=2e-3)


@widths
def test_caldera(minilm_layer2, minilm_statistics, bits):
    steps = 3
    weight, statistics = minilm_layer2[SQUARE], minilm_statistics[SQUARE]
    H = reference.blended(statistics.second_moment.double().numpy(), CLOQ / (1 + CLOQ))
    W = weight.double().numpy()
    plain = reference.objective(W, transcription.quantize(W, bits), H)
    Qs, Ls = reference.caldera(W, H, bits, RANK, steps)
    expected = [plain, *(reference.objective(W, Q + L, H) for Q, L in zip(Qs, Ls, strict=True))]
    spec = QuantSpec(bits, **PUBLISHED)
    settings = {"rank": RANK, "method": "caldera", "importance": statistics, "svd": "exact"}
    for count in range(1, steps + 1):
        result = decompose(weight, spec, num_iter=count, **settings)
        # ties part the two trajectories, to other roundings that are as good
        assert result.objectives[:2] == pytest.approx(expected[:2], rel=1e-3)
        assert result.objectives == pytest.approx(expected[: count + 1], rel=5e-3)
        assert result.best_iter == int(np.argmin(result.objectives))
        assert_reported(result, weight, H)


def test_caldera_adapter_is_float16_before_the_scaling(minilm_layer2, minilm_statistics):
    weight, statistics = minilm_layer2[SQUARE], minilm_statistics[SQUARE]
    # of mean diagonal 1: how large each factor is depends on it, and so what it is rounded to
    H = reference.blended(statistics.second_moment.double().numpy(), CLOQ / (1 + CLOQ))
    settings = {"rank": RANK, "num_iter": 1, "importance": statistics, "svd": "exact", "lora_alpha": 5}
    result = decompose(weight, QuantSpec(2, **PUBLISHED), method="caldera", **settings)
    residual = weight.double().numpy() - result.quantized.dequantize().double().numpy()
    left, right = reference.factors(residual, RANK, *reference.roots(H))
    for ours, theirs in ((result.lora_B.T, left.T), (result.lora_A, right)):
        for found, expected in zip(ours.double().numpy(), theirs, strict=True):
            half = expected.astype(np.float16).astype(np.float64)
            # α/r and the balance of the factors are one number a component; most elements were rounded as here
            unscaled = found / np.median(found[half != 0] / half[half != 0])
            nearest = unscaled.astype(np.float16).astype(np.float64)
            normal = np.abs(nearest) > 2**-14
            # unrounded numbers would lie up to 2^-11 of themselves from float16's, half of them above 2^-13
            distance = np.median(np.abs(unscaled - nearest)[normal] / np.abs(nearest)[normal])
            assert distance < 2**-18, f"{distance:.1e}"


# --- SVD first -----------------------------------------------------------------------------------------------------


@widths
@weights
def test_pissa(minilm_layer2, name, bits):
    weight = minilm_layer2[name]
    W = weight.double().numpy()
    L = reference.low_rank(W, RANK, np.eye(W.shape[1]))
    Q = transcription.quantize(W - L, bits)
    result = decompose(weight, QuantSpec(bits, **PUBLISHED), rank=RANK, num_iter=5, method="pissa", svd="exact")
    assert result.errors[1:] == [pytest.approx(np.linalg.norm(W - L - Q) / np.linalg.norm(W), rel=1e-5)]
    assert result.best_iter == 1
    assert_adapter(result, L, 1e-4)
    assert np.mean(np.abs(result.quantized.dequantize().numpy() - Q) > 1e-5) < 1e-4


@widths
def test_qpissa(minilm_layer2, bits):
    weight = minilm_layer2[SQUARE]
    W = weight.double().numpy()
    L = reference.low_rank(W, RANK, np.eye(W.shape[1]))
    expected = [np.linalg.norm(W - transcription.quantize(W, bits))]
    for _ in range(3):
        Q = transcription.quantize(W - L, bits)
        L = reference.low_rank(W - Q, RANK, np.eye(W.shape[1]))
        expected.append(np.linalg.norm(W - Q - L))
    spec = QuantSpec(bits, **PUBLISHED)
    result = decompose(weight, spec, rank=RANK, num_iter=3, method="qpissa", svd="exact")
    assert result.errors == pytest.approx(np.array(expected) / np.linalg.norm(W), rel=1e-4)


@widths
@weights
def test_lq_lora(minilm_layer2, minilm_statistics, name, bits):
    weight, statistics = minilm_layer2[name], minilm_statistics[name]
    W = weight.double().numpy()
    rows = statistics.fisher_rows.double().numpy()[:, None]
    columns = statistics.fisher_columns.double().numpy()

    def fisher_norm(error: np.ndarray) -> float:
        return float(np.linalg.norm(rows * error * columns) / np.linalg.norm(rows * W * columns))

    Q = np.zeros_like(W)
    expected = [fisher_norm(W - transcription.quantize(W, bits))]
    for step in range(2):
        U, sigma, Vt = np.linalg.svd(rows * (W - Q) * columns, full_matrices=False)
        L = (U[:, :RANK] * sigma[:RANK]) @ Vt[:RANK] / rows / columns
        Q = transcription.quantize(W - L, bits)
        expected.append(fisher_norm(W - Q - L))
        result = decompose(
            weight,
            QuantSpec(bits, **PUBLISHED),
            rank=RANK,
            num_iter=step + 1,
            method="lq-lora",
            importance=statistics,
            svd="exact",
        )
        assert result.objectives == pytest.approx(expected, rel=1e-4)
        assert result.best_iter == int(np.argmin(expected))
        assert fisher_norm(W - dense_of(result)) == pytest.approx(min(expected), rel=1e-4)
        if step == 0:
            assert_adapter(result, L)
