"""What holds for every method, with statistics of the inputs and without."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_inputs import assert_sound, gaussian, same, statistics_for, true_dense, true_error

from loftq.codec import quantize
from loftq.config import BITS, CODEBOOKS, METHODS, SCALES, QuantSpec
from loftq.solver import decompose
from loftq.solver.importance import InputStatistics
from loftq.solver.methods import METHODS as TABLE

pytestmark = pytest.mark.usefixtures("one_thread")

every_method = pytest.mark.parametrize("method", METHODS)


# --- invariants ----------------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize(
    ("alpha", "rslora"), [(None, False), (2, False), (16, False), (None, True), (24, True)], ids=str
)
def test_result_reproduces_its_error_for_every_alpha(method, alpha, rslora):
    weight, statistics = gaussian(60, 100), statistics_for(60, 100)
    fixed = {"rank": 8, "num_iter": 2, "method": method, "importance": statistics}
    result = decompose(weight, QuantSpec(2), **fixed, lora_alpha=alpha, use_rslora=rslora)
    plain = decompose(weight, QuantSpec(2), **fixed)
    assert result.scaling == (alpha or 8) / (math.sqrt(8) if rslora else 8)
    assert_sound(weight, result, 8)
    assert result.errors == plain.errors
    assert result.objectives == plain.objectives
    torch.testing.assert_close(true_dense(result), true_dense(plain), rtol=0, atol=1e-5)
    torch.testing.assert_close(result.dequantize().double(), true_dense(result), rtol=0, atol=1e-5)


STORED = [QuantSpec(bits, codebook, block_size=32) for bits in BITS for codebook in CODEBOOKS]
STORED += [QuantSpec(bits, block_size=32, double_quant=True) for bits in BITS]


@every_method
@pytest.mark.parametrize("spec", STORED, ids=lambda s: f"{s.codebook}{s.bits}" + "-double" * s.double_quant)
def test_every_way_to_store(spec, method):
    weight, statistics = gaussian(30, 72), statistics_for(30, 72)
    result = decompose(weight, spec, rank=4, num_iter=2, method=method, importance=statistics)
    assert_sound(weight, result, 4)
    assert result.quantized.spec == spec
    if TABLE[method].candidates == ():
        assert result.objective == min(result.objectives)
        plain = quantize(weight, spec).dequantize().double()
        error = float((weight.double() - plain).norm() / weight.double().norm())
        assert result.errors[0] == pytest.approx(error, abs=1e-6)


@settings(max_examples=120)
@given(
    rows=st.integers(1, 24),
    n=st.integers(1, 70),
    rank=st.integers(1, 30),
    num_iter=st.integers(0, 3),
    seed=st.integers(0, 10_000),
    spec=st.builds(
        QuantSpec,
        bits=st.sampled_from(BITS),
        codebook=st.sampled_from(CODEBOOKS),
        scale=st.sampled_from(SCALES),
        block_size=st.just(32),
        double_quant=st.booleans(),
    ),
    method=st.sampled_from(METHODS),
    diagonal=st.booleans(),
    damping=st.sampled_from([None, 0.0, 0.3, 1.0]),
)
def test_never_worse_than_plain_quantization_in_its_objective(
    rows, n, rank, num_iter, seed, spec, method, diagonal, damping
):
    weight, statistics = gaussian(rows, n, seed), statistics_for(rows, n, seed, diagonal=diagonal)
    fixed = {"rank": rank, "importance": statistics, "damping": damping}
    result = decompose(weight, spec, num_iter=num_iter, method=method, **fixed)
    assert_sound(weight, result, rank)
    assert result.objective <= result.objectives[0] * (1 + 1e-6)
    # what the rank has beyond the matrix does nothing yet, and can learn
    smallest = min(rows, n)
    if rank > smallest:
        assert not result.lora_B[:, smallest:].any()
        assert bool((result.lora_A[smallest:] != 0).all())


@every_method
@pytest.mark.parametrize(("rows", "n"), [(5, 40), (40, 5), (1, 1), (1, 70), (70, 1)], ids=str)
def test_rank_beyond_the_smaller_side(rows, n, method):
    weight = gaussian(rows, n)
    result = decompose(weight, QuantSpec(4), rank=48, method=method, importance=statistics_for(rows, n))
    assert_sound(weight, result, 48)
    if TABLE[method].steps != 0:
        # a full-rank adapter holds what is left: float32, and float16 for CALDERA's
        assert true_error(weight, result) <= (2e-3 if TABLE[result.method].half_adapter else 3e-5), result.errors


@every_method
@pytest.mark.parametrize("factor", [1e-30, 1e30], ids=["tiny", "huge"])
def test_extreme_weights(method, factor):
    weight, statistics = gaussian(40, 70), statistics_for(40, 70)
    fixed = {"rank": 6, "num_iter": 2, "method": method, "importance": statistics}
    plain, scaled = (decompose(w, QuantSpec(2), **fixed) for w in (weight, weight * factor))
    assert bool(scaled.lora_A.isfinite().all() & scaled.lora_B.isfinite().all())
    assert scaled.errors == pytest.approx(plain.errors, rel=2e-2)  # other roundings of the scales, and what follows
    assert scaled.objectives == pytest.approx(plain.objectives, rel=2e-2)
    dense = scaled.dequantize().double() / factor
    assert float((weight.double() - dense).norm() / weight.double().norm()) == pytest.approx(scaled.error, abs=2e-6)


@every_method
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_magnitude_of_the_inputs_does_not_matter(method, scale):
    weight, statistics = gaussian(30, 64), statistics_for(30, 64)
    scaled = InputStatistics(
        statistics.second_moment * scale,
        mean_abs=statistics.mean_abs * scale**0.5,
        tokens=7,
        fisher_rows=statistics.fisher_rows * scale,
        fisher_columns=statistics.fisher_columns * scale,
    )
    fixed = {"rank": 6, "num_iter": 2, "method": method}
    results = [decompose(weight, QuantSpec(2), importance=given, **fixed) for given in (statistics, scaled)]
    assert results[0].objective == pytest.approx(results[1].objective, rel=2e-2)


@every_method
@pytest.mark.parametrize("value", [0.7, -0.7, 0.0])
def test_single_element(method, value):
    statistics = statistics_for(1, 1)
    result = decompose(torch.tensor([[value]]), QuantSpec(2), rank=1, method=method, importance=statistics)
    assert float(result.dequantize()) == pytest.approx(value, rel=2**-10)


@every_method
def test_zero_matrix_is_exact(method):
    weight, statistics = torch.zeros(40, 70), statistics_for(40, 70)
    result = decompose(weight, QuantSpec(2), rank=4, num_iter=2, method=method, importance=statistics)
    assert set(result.errors) == set(result.objectives) == {0.0}
    assert torch.equal(result.dequantize(), weight)


@every_method
def test_same_seed_same_result_and_nothing_is_changed(method):
    weight, statistics = gaussian(40, 96), statistics_for(40, 96)
    kept = [t.clone() for t in (weight, statistics.second_moment, statistics.mean_abs)]
    fixed = {"rank": 6, "num_iter": 2, "method": method, "importance": statistics, "seed": 3}
    first, again = (decompose(weight, QuantSpec(2), **fixed) for _ in "12")
    assert same(first, again)
    assert first.objectives == again.objectives
    for before, after in zip(kept, (weight, statistics.second_moment, statistics.mean_abs), strict=True):
        assert torch.equal(before, after)
