"""Error feedback against a float64 transcription of GPTQ; coordinate descent against every single change of a code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import transcription_gptq
from loftq import kernels
from loftq.codec import QuantizedTensor, quantize
from loftq.codec.codebook import thresholds
from loftq.config import BITS, CODEBOOKS, PUBLISHED, SCALES, QuantSpec
from loftq.solver.errorfeedback import round_with_feedback
from loftq.solver.importance import InputStatistics, Metric

pytestmark = pytest.mark.usefixtures("one_thread")

DAMPING = 0.01 / 1.01  # H + 0.01 tr(H) / d I up to a factor


def gaussian(rows: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))


def correlated(n: int, seed: int = 0, tokens: int = 400) -> Tensor:
    """A second moment with a few large directions, as activations have."""
    x = gaussian(tokens, n, seed + 1) @ (torch.eye(n) + 0.5 * gaussian(n, n, seed + 2) / n**0.5)
    x *= torch.exp(0.7 * gaussian(1, n, seed + 3))
    return x.T @ x / tokens


def full_metric(moment: Tensor, damping: float = 0.02) -> Metric:
    return InputStatistics(moment).metric("full", damping)


def objective(weight: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> float:
    error = weight.double() - quantized.dequantize().double()
    return float(((error @ hessian.double()) * error).sum())


def grid_of(quantized: QuantizedTensor) -> np.ndarray:
    """(out, in, levels) all values that the elements may have under the stored scales, float64."""
    block_size, n = quantized.spec.block_size, quantized.shape[1]
    scale = quantized.scale().double().repeat_interleave(block_size, 1)[:, :n, None]
    levels = quantized.tensors["weight_codebook"].double().expand(quantized.shape[0], -1)[:, None]
    zero = quantized.zero()
    offset = 0.0 if zero is None else zero.double().repeat_interleave(block_size, 1)[:, :n, None] * levels[..., 1:2]
    return (scale * (levels + offset)).numpy()


def assert_codes_of_gptq(weight: Tensor, moment: Tensor, found: QuantizedTensor) -> None:
    """Every row has the transcription's codes up to where it met a tie; few rows met one."""
    H = transcription_gptq.damped(moment.double().numpy(), 0.01)
    grid, order = grid_of(found), transcription_gptq.act_order(H)
    Q, rounded = transcription_gptq.gptq(weight.double().numpy(), H, grid, order)
    ours = found.dequantize().double().numpy()
    spacing = np.abs(np.diff(grid, axis=2)).min(2)
    differs = (np.abs(ours - Q) > 0.25 * spacing)[:, order]
    parted = np.flatnonzero(differs.any(1))
    # float32, and a factor of H in float32: the errors of the columns before amount to a few thousandths of a step
    for row in parted:
        column = order[differs[row].argmax()]
        distances = np.sort(np.abs(grid[row, column] - rounded[row, column]))
        step = spacing[row, column]
        assert distances[1] - distances[0] <= 5e-3 * step, (
            f"row {row} parts at column {column}, {(distances[1] - distances[0]) / step:.1e} steps from a tie"
        )
    assert len(parted) <= 0.15 * len(weight), f"{len(parted)} of {len(weight)} rows met a tie"
    costs, expected = (np.sum(((weight.numpy() - q) @ H) * (weight.numpy() - q), axis=1) for q in (ours, Q))
    same = ~differs.any(1)
    np.testing.assert_allclose(costs[same], expected[same], rtol=1e-4)
    assert costs.sum() == pytest.approx(expected.sum(), rel=1e-2)


@pytest.mark.parametrize("name", ["attention.self.query", "attention.output.dense", "intermediate.dense"])
@pytest.mark.parametrize("bits", [2, 3, 4], ids=lambda bits: f"{bits}bit")
def test_codes_equal_the_transcription(minilm_layer2, minilm_statistics, bits, name):
    weight, statistics = minilm_layer2[name][:256].contiguous(), minilm_statistics[name]
    found = round_with_feedback(weight, QuantSpec(bits, **PUBLISHED), statistics.metric("full", DAMPING))
    assert_codes_of_gptq(weight, statistics.second_moment, found)


def test_codes_equal_the_transcription_on_a_wide_matrix(minilm_layer2, minilm_statistics):
    weight, statistics = minilm_layer2["output.dense"][:48].contiguous(), minilm_statistics["output.dense"]
    found = round_with_feedback(weight, QuantSpec(2), statistics.metric("full", DAMPING))
    assert_codes_of_gptq(weight, statistics.second_moment, found)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("bits", BITS, ids=lambda bits: f"{bits}bit")
def test_codes_equal_the_transcription_for_every_codebook(bits, codebook):
    weight, moment = gaussian(40, 150), correlated(150)  # a ragged last block
    found = round_with_feedback(weight, QuantSpec(bits, codebook), full_metric(moment, DAMPING))
    assert_codes_of_gptq(weight, moment, found)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("bits", BITS, ids=lambda bits: f"{bits}bit")
def test_identity_is_round_to_nearest(bits, codebook, scale):
    weight, spec = gaussian(20, 150), QuantSpec(bits, codebook, scale=scale)
    found = round_with_feedback(weight, spec, full_metric(torch.eye(150)))
    plain = quantize(weight, spec)
    different = int((found.codes() != plain.codes()).sum())
    assert all(torch.equal(t, plain.tensors[n]) for n, t in found.tensors.items()), f"{different} codes differ"


@pytest.mark.parametrize("bits", [2, 3, 4], ids=lambda bits: f"{bits}bit")
def test_feedback_lowers_the_output_error_of_real_weights(minilm_layer2, minilm_statistics, bits):
    for name, weight in minilm_layer2.items():
        if name == "output.dense":
            continue
        metric = minilm_statistics[name].metric("full", DAMPING)
        plain = objective(weight, quantize(weight, QuantSpec(bits)), metric.hessian)
        found = objective(weight, round_with_feedback(weight, QuantSpec(bits), metric), metric.hessian)
        assert found < 0.9 * plain, f"{name}: {found / plain:.3f} of round-to-nearest's"


# --- coordinate descent --------------------------------------------------------------------------------------------

specs = st.builds(
    QuantSpec,
    bits=st.sampled_from(BITS),
    codebook=st.sampled_from(CODEBOOKS),
    scale=st.sampled_from(SCALES),
    block_size=st.sampled_from([32, 64]),
    scale_dtype=st.just("float32"),
)
sizes = {"rows": st.integers(1, 6), "n": st.integers(1, 90), "seed": st.integers(0, 10_000)}


@settings(max_examples=150)
@given(**sizes, spec=specs, power=st.integers(1, 3), damping=st.sampled_from([0.0, 0.02, 0.5, 1.0]))
def test_descent_never_raises_the_objective(rows, n, seed, spec, power, damping):
    weight = gaussian(rows, n, seed) ** power
    metric = full_metric(correlated(n, seed), damping)
    errors = [
        objective(weight, round_with_feedback(weight, spec, metric, sweeps=sweeps), metric.hessian)
        for sweeps in (0, 1, 3)
    ]
    # its gradient is float32: what is left is small beside the weight's own rounding
    tolerance = 1e-5 * errors[0] + 2**-40 * float(((weight @ metric.hessian) * weight).sum())
    assert max(errors) <= errors[0] + tolerance, errors


@settings(max_examples=60)
@given(**sizes, spec=specs, refit=st.booleans())
def test_descent_ends_where_no_single_code_helps(rows, n, seed, spec, refit):
    weight, hessian = gaussian(rows, n, seed), full_metric(correlated(n, seed)).hessian
    plain = quantize(weight, spec)
    levels, zero, scale = plain.tensors["weight_codebook"].float(), plain.zero(), plain.scale().clone()
    codes, dense = plain.codes(), plain.dequantize()
    constants = (zero, levels, thresholds(levels), spec.block_size)
    if refit:
        gradient = ((weight - dense) @ hessian).contiguous()
        kernels.descend(gradient, hessian, scale, *constants, codes, dense, 2, True)
    for _ in range(50):  # each change lowers the objective, so they come to an end
        before = codes.clone()
        gradient = ((weight - dense) @ hessian).contiguous()
        kernels.descend(gradient, hessian, scale, *constants, codes, dense, 1, False)
        if torch.equal(before, codes):
            break
    else:
        pytest.fail("codes still change after 50 sweeps")

    spread = scale.double().repeat_interleave(spec.block_size, 1)[:, :n, None]
    offset = (
        0.0 if zero is None else zero.double().repeat_interleave(spec.block_size, 1)[:, :n, None] * levels[..., 1:2]
    )
    values = spread * (levels.double().expand(rows, -1)[:, None] + offset)
    current = values.gather(2, codes.long()[..., None])
    error = weight.double() - current[..., 0]
    # |E P|² changes by h_jj step² - 2 step (E H)_j when element j goes up by step
    steps = values - current
    slope = (error @ hessian.double())[..., None]
    gain = 2 * steps * slope - hessian.diagonal().double()[:, None] * steps.square()
    total = float(((error @ hessian.double()) * error).sum())
    scale_of_rounding = 2**-21 * (weight.abs().max() * hessian.abs().max() * n**0.5) * steps.abs()
    worst = float((gain - 2 * scale_of_rounding).max())
    assert worst <= 1e-6 * total, f"a single code would lower the objective {total:.3e} by {worst:.3e}"


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("double_quant", [False, True], ids=["scales", "double"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("bits", [2, 3, 4], ids=lambda bits: f"{bits}bit")
def test_descent_helps_with_rounded_scales(bits, codebook, scale, double_quant, scale_dtype):
    weight, metric = gaussian(48, 150), full_metric(correlated(150))
    spec = QuantSpec(bits, codebook, scale=scale, scale_dtype=scale_dtype, double_quant=double_quant)
    without, two = (
        objective(weight, round_with_feedback(weight, spec, metric, sweeps=sweeps), metric.hessian) for sweeps in (0, 2)
    )
    assert two < without, f"{two / without:.4f} of the error without descent"


def test_refitted_levels_ascend_to_a_largest_magnitude_of_1(minilm_layer2, minilm_statistics):
    name = "attention.self.query"
    weight, metric = minilm_layer2[name][:128].contiguous(), minilm_statistics[name].metric("full", 0.02)
    found = round_with_feedback(weight, QuantSpec(2, scale_dtype="float32"), metric, sweeps=8)
    levels = found.tensors["weight_codebook"]
    assert bool((levels.diff() > 0).all())
    assert float(levels.abs().max()) == pytest.approx(1, abs=1e-6)


def test_input_is_left_alone():
    weight, metric = gaussian(8, 100), full_metric(correlated(100))
    kept = [t.clone() for t in (weight, metric.hessian, metric.inverse, metric.order)]
    round_with_feedback(weight, QuantSpec(2), metric, sweeps=2)
    for before, after in zip(kept, (weight, metric.hessian, metric.inverse, metric.order), strict=True):
        assert torch.equal(before, after)
