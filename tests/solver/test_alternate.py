"""The alternation: Algorithm 1 to the letter with the published settings, and never worse than plain quantization."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_inputs import same, statistics_for
from torch import Tensor

import transcription
from live_bytes import LiveBytes
from loftq.codec import quantize
from loftq.config import BITS, CODEBOOKS, PUBLISHED, SCALES, QuantSpec
from loftq.errors import ConfigError, WeightError
from loftq.solver import Decomposition, decompose, lora_scaling
from torch_defaults import DEFAULTS, torch_default

pytestmark = pytest.mark.usefixtures("one_thread")

# The other methods work on statistics of the inputs: test_methods.py
WEIGHT_ONLY = ["loftq", "loftq-svd-first", "qlora", "rtn", "pissa", "qpissa"]
STEPS = {"qlora": 0, "rtn": 0, "pissa": 1}  # the others take num_iter

WEIGHTS = ["attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense"]

# An element on a threshold that rounds the other way changes the trajectory from there on. For this matrix the float64
# transcription's own errors move by 9e-6 within 5 steps when the weights change by 1e-7 of themselves (float32
# rounding); for the others by at most 2e-9.
SENSITIVE = {"intermediate.dense": 3e-5}


def gaussian(rows: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))


def true_error(weight: Tensor, result: Decomposition) -> float:
    """Relative Frobenius error of what a layer will compute, in float64."""
    product = result.lora_B.double() @ result.lora_A.double()
    dense = result.quantized.dequantize().double() + result.scaling * product
    norm = float(weight.double().norm())
    return float((weight.double() - dense).norm()) / (norm or 1.0)


# --- the published algorithm ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4], ids=["2bit", "4bit"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_published_settings_equal_the_transcription(minilm_layer2, name, bits):
    weight = minilm_layer2[name]
    *_, expected = transcription.algorithm_1(weight.numpy(), bits, 32, 5)
    spec = QuantSpec(bits, **PUBLISHED)

    once = decompose(weight, spec, rank=32, num_iter=1, svd="exact")
    assert once.errors[1:] == pytest.approx(expected[:1], abs=1e-5)
    assert true_error(weight, once) == pytest.approx(once.error, abs=1e-6)

    result = decompose(weight, spec, rank=32, num_iter=5, svd="exact")
    differences = [ours - theirs for ours, theirs in zip(result.errors[1:], expected, strict=True)]
    assert max(map(abs, differences)) <= SENSITIVE.get(name, 1e-5), f"differences per step {differences}"
    assert true_error(weight, result) == pytest.approx(result.error, abs=1e-6)


@pytest.mark.parametrize("bits", [2, 4], ids=["2bit", "4bit"])
def test_plain_quantization_equals_the_transcription(minilm_layer2, bits):
    for name, weight in minilm_layer2.items():
        W = weight.double().numpy()
        expected = np.linalg.norm(W - transcription.quantize(W, bits)) / np.linalg.norm(W)
        result = decompose(weight, QuantSpec(bits, **PUBLISHED), rank=8, num_iter=0)
        assert result.errors == [pytest.approx(expected, rel=1e-6)], name


@pytest.mark.parametrize("bits", [2, 4], ids=["2bit", "4bit"])
def test_backbone_and_adapter_equal_the_transcription_after_one_step(minilm_layer2, bits):
    weight = minilm_layer2["attention.self.value"]
    Q, A, B, _ = transcription.algorithm_1(weight.numpy(), bits, 16, 1)
    result = decompose(weight, QuantSpec(bits, **PUBLISHED), rank=16, num_iter=1, svd="exact")
    backbone = (result.quantized.dequantize() - torch.from_numpy(Q)).abs()
    flipped = int((backbone > 1e-6).sum())
    assert flipped < 1e-4 * weight.numel(), f"{flipped} elements round to another level"
    # singular vectors have a free sign, and their product's error grows with the inverse gap of singular values
    product = result.lora_B.double() @ result.lora_A.double() - torch.from_numpy(A @ B.T)
    ratio = float(product.norm()) / np.linalg.norm(A @ B.T)
    assert ratio <= 1e-3, f"adapters differ by {ratio:.1e} of themselves"
    # both factors get the square roots of the singular values
    torch.testing.assert_close(result.lora_A.norm(dim=1), result.lora_B.norm(dim=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("bits", [2, 4], ids=["2bit", "4bit"])
def test_svd_first_equals_the_transcription(minilm_layer2, bits):
    weight = minilm_layer2["attention.self.query"]
    *_, expected = transcription.algorithm_1(weight.numpy(), bits, 32, 3, svd_first=True)
    spec = QuantSpec(bits, **PUBLISHED)
    result = decompose(weight, spec, rank=32, num_iter=3, method="loftq-svd-first", svd="exact")
    assert result.errors[1:] == pytest.approx(expected, abs=1e-5)


# --- the scaling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "rslora"),
    [(2, False), (8, False), (16, False), (None, False), (2, True), (8, True), (16, True), (None, True)],
    ids=["r/4", "r", "2r", "default", "r/4-rslora", "r-rslora", "2r-rslora", "default-rslora"],
)
@pytest.mark.parametrize("num_iter", [1, 5], ids=["T1", "T5"])
@pytest.mark.parametrize("method", ["loftq", "loftq-svd-first"])
def test_result_does_not_depend_on_alpha(method, num_iter, alpha, rslora):
    weight, rank = gaussian(60, 96), 8
    fixed = {"rank": rank, "num_iter": num_iter, "method": method}
    plain = decompose(weight, QuantSpec(2), **fixed)
    result = decompose(weight, QuantSpec(2), **fixed, lora_alpha=alpha, use_rslora=rslora)
    assert result.scaling == (alpha or rank) / (math.sqrt(rank) if rslora else rank)
    # float32 factors and their product: a few roundings of numbers no larger than the weight's
    assert true_error(weight, result) == pytest.approx(true_error(weight, plain), abs=1e-6)
    assert true_error(weight, result) == pytest.approx(result.error, abs=1e-6)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("bits", [2, 4], ids=["2bit", "4bit"])
def test_real_weight_reproduces_the_reported_error_for_every_alpha(minilm_layer2, bits, name):
    weight, spec = minilm_layer2[name], QuantSpec(bits, **PUBLISHED)
    expected = decompose(weight, spec, rank=32, num_iter=2, svd="block").error
    for alpha, rslora in itertools.product((8, 16, 32, 64), (False, True)):
        scaling = {"lora_alpha": alpha, "use_rslora": rslora}
        result = decompose(weight, spec, rank=32, num_iter=2, svd="block", **scaling)
        assert true_error(weight, result) == pytest.approx(result.error, abs=1e-5), scaling
        assert true_error(weight, result) == pytest.approx(expected, abs=1e-5), scaling


@pytest.mark.parametrize(
    ("alpha", "rank", "rslora", "expected"),
    [(None, 8, False, 1.0), (16, 8, False, 2.0), (4, 16, False, 0.25), (16, 16, True, 4.0), (None, 9, True, 3.0)],
)
def test_lora_scaling(alpha, rank, rslora, expected):
    assert lora_scaling(alpha, rank, rslora) == expected


def test_dense_result_is_backbone_plus_scaled_product():
    result = decompose(gaussian(20, 40), QuantSpec(2), rank=4, lora_alpha=12)
    expected = result.quantized.dequantize() + 3.0 * result.lora_B @ result.lora_A
    torch.testing.assert_close(result.dequantize(), expected, rtol=1e-6, atol=1e-6)


# --- the best iterate ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", WEIGHT_ONLY)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("bits", BITS, ids=lambda bits: f"{bits}bit")
def test_best_iterate_is_kept_and_reproduces_its_error(bits, codebook, scale, method):
    weight = gaussian(50, 100)
    result = decompose(weight, QuantSpec(bits, codebook, scale=scale), rank=6, num_iter=4, method=method)
    assert len(result.errors) == 1 + STEPS.get(method, 4)
    assert result.objectives == result.errors
    assert result.method == method
    assert result.error == result.errors[result.best_iter] == min(result.errors), result.errors
    assert true_error(weight, result) == pytest.approx(result.error, abs=1e-6)


@settings(max_examples=150)
@given(
    rows=st.integers(1, 40),
    n=st.integers(1, 80),
    rank=st.integers(1, 12),
    num_iter=st.integers(0, 4),
    seed=st.integers(0, 10_000),
    power=st.integers(1, 3),
    spec=st.builds(
        QuantSpec,
        bits=st.sampled_from(BITS),
        codebook=st.sampled_from(CODEBOOKS),
        scale=st.sampled_from(SCALES),
        block_size=st.sampled_from([32, 64]),
        double_quant=st.booleans(),
    ),
    method=st.sampled_from(WEIGHT_ONLY),
    svd=st.sampled_from(["exact", "block"]),
)
def test_never_worse_than_plain_quantization(rows, n, rank, num_iter, seed, power, spec, method, svd):
    weight = gaussian(rows, n, seed) ** power
    result = decompose(weight, spec, rank=rank, num_iter=num_iter, method=method, svd=svd)
    plain = float((weight - quantize(weight, spec).dequantize()).double().norm() / weight.double().norm())
    # reported in float32: a few roundings of a number up to 1
    assert true_error(weight, result) <= plain + 1e-6, f"{true_error(weight, result)} against {plain}"
    assert result.errors[0] == pytest.approx(plain, abs=1e-6)
    assert true_error(weight, result) == pytest.approx(result.error, abs=2e-6)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("bits", [2, 3, 4], ids=["2bit", "3bit", "4bit"])
def test_default_is_better_than_published(minilm_layer2, name, bits):
    weight = minilm_layer2[name]
    published = decompose(weight, QuantSpec(bits, **PUBLISHED), rank=32, num_iter=2)
    default = decompose(weight, QuantSpec(bits), rank=32, num_iter=2)
    assert default.error < published.error, f"{default.error:.4f} against {published.error:.4f}"
    assert default.quantized.bits_per_weight < published.quantized.bits_per_weight


def test_default_error_and_size_on_a_real_layer(minilm_layer2):
    results = [decompose(weight, QuantSpec(2), rank=32, num_iter=5) for weight in minilm_layer2.values()]
    mean = statistics.mean(result.error for result in results)
    assert mean <= 0.262, f"mean relative error {mean:.4f}: {[round(r.error, 4) for r in results]}"
    size = max(result.quantized.bits_per_weight for result in results)
    assert size <= 2.27, f"{size:.4f} bits per weight"


@pytest.mark.parametrize("bits", [2, 4], ids=["2bit", "4bit"])
def test_block_power_reaches_the_exact_objective(minilm_layer2, bits):
    ratios = []
    for weight in minilm_layer2.values():
        block, exact = (decompose(weight, QuantSpec(bits), rank=32, svd=svd) for svd in ("block", "exact"))
        ratios.append(block.error / exact.error)
    # a single matrix's trajectory may end a little farther off, in either direction
    assert statistics.mean(ratios) <= 1.003, ratios
    assert max(ratios) <= 1.005, ratios


# --- no adapter, too much adapter ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", WEIGHT_ONLY)
def test_without_iterations_the_adapter_starts_as_in_peft(method):
    weight = gaussian(30, 64)
    result = decompose(weight, QuantSpec(2), rank=8, num_iter=0, method=method)
    assert_peft_start(result, weight)


@pytest.mark.parametrize("method", ["qlora", "rtn"])
def test_qlora_ignores_iterations(method):
    weight = gaussian(30, 64)
    result = decompose(weight, QuantSpec(2), rank=8, num_iter=5, method=method)
    assert_peft_start(result, weight)


def assert_peft_start(result: Decomposition, weight: Tensor) -> None:
    """B zero, A uniform in ±1/sqrt(in), Q the plain quantization."""
    assert torch.equal(result.lora_B, torch.zeros(30, 8))
    bound = 1 / math.sqrt(64)
    assert 0.9 * bound <= float(result.lora_A.abs().max()) <= bound
    assert float(result.lora_A.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)  # 512 numbers
    assert len(result.errors) == 1
    assert result.best_iter == 0
    assert torch.equal(result.quantized.dequantize(), quantize(weight, QuantSpec(2)).dequantize())


@pytest.mark.parametrize(("rows", "n"), [(5, 40), (40, 5), (1, 1), (1, 70), (70, 1)], ids=str)
@pytest.mark.parametrize("method", ["loftq", "loftq-svd-first"])
def test_rank_beyond_the_smaller_side(rows, n, method):
    weight, rank = gaussian(rows, n), 12
    result = decompose(weight, QuantSpec(2), rank=rank, method=method)
    assert result.lora_A.shape == (rank, n)
    assert result.lora_B.shape == (rows, rank)
    # a full-rank adapter holds the whole residual: only float32 remains
    assert true_error(weight, result) <= 1e-6, result.errors
    # the surplus does nothing yet and can learn
    assert torch.equal(result.lora_B[:, min(rows, n) :], torch.zeros(rows, rank - min(rows, n)))
    assert bool((result.lora_A[min(rows, n) :] != 0).all())


@pytest.mark.parametrize("value", [0.7, -0.7, 0.0])
@pytest.mark.parametrize("method", WEIGHT_ONLY)
def test_single_element(method, value):
    result = decompose(torch.tensor([[value]]), QuantSpec(2), rank=1, method=method)
    assert float(result.dequantize()) == pytest.approx(value, rel=2**-10)  # a float16 scale


@pytest.mark.parametrize("method", WEIGHT_ONLY)
@pytest.mark.parametrize("svd", ["exact", "block"])
def test_zero_matrix_is_exact(method, svd):
    result = decompose(torch.zeros(200, 210), QuantSpec(2), rank=4, num_iter=2, method=method, svd=svd)
    assert set(result.errors) == {0.0}
    assert torch.equal(result.dequantize(), torch.zeros(200, 210))


@pytest.mark.parametrize("factor", [2.0**-90, 2.0**90], ids=["tiny", "huge"])
@pytest.mark.parametrize("svd", ["exact", "block"])
def test_range_of_weights(svd, factor):
    weight = gaussian(40, 72)
    plain = decompose(weight, QuantSpec(2), rank=8, svd=svd)
    scaled = decompose(weight * factor, QuantSpec(2), rank=8, svd=svd)
    assert scaled.errors == pytest.approx(plain.errors, rel=1e-2)


# --- determinism, dtypes, errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", WEIGHT_ONLY)
@pytest.mark.parametrize("svd", ["exact", "block"])
def test_same_seed_same_result(method, svd):
    weight = gaussian(220, 256)
    first, again = (decompose(weight, QuantSpec(2), rank=8, num_iter=2, method=method, svd=svd, seed=5) for _ in "12")
    assert first.errors == again.errors
    assert torch.equal(first.lora_A, again.lora_A)
    assert torch.equal(first.lora_B, again.lora_B)
    assert all(torch.equal(t, again.quantized.tensors[n]) for n, t in first.quantized.tensors.items())


def test_another_seed_another_random_start():
    results = [decompose(gaussian(20, 30), QuantSpec(2), rank=4, num_iter=0, seed=seed) for seed in (0, 1)]
    assert not torch.equal(results[0].lora_A, results[1].lora_A)


def test_global_random_state_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    decompose(gaussian(220, 256), QuantSpec(2), rank=8, num_iter=1, svd="block")
    decompose(gaussian(20, 30), QuantSpec(2), rank=8, num_iter=0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_are_decomposed_as_float32(dtype):
    weight = gaussian(30, 70).to(dtype)
    result = decompose(weight, QuantSpec(2), rank=4, num_iter=2)
    assert result.lora_A.dtype == result.lora_B.dtype == torch.float32
    assert result.errors == decompose(weight.float(), QuantSpec(2), rank=4, num_iter=2).errors


def test_weight_is_not_changed():
    weight = gaussian(30, 70).requires_grad_()
    before = weight.detach().clone()
    result = decompose(weight, QuantSpec(2), rank=4, num_iter=2)
    assert torch.equal(weight.detach(), before)
    assert not result.lora_A.requires_grad


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rank": 0}, r"^rank is 0, expected an integer of at least 1$"),
        ({"rank": -3}, r"^rank is -3, expected an integer of at least 1$"),
        ({"rank": 2.5}, r"^rank is 2\.5, expected an integer of at least 1$"),
        ({"rank": True}, r"^rank is True, expected an integer"),
        ({"num_iter": -1}, r"^num_iter is -1, expected an integer of at least 0$"),
        ({"num_iter": None}, r"^num_iter is None, expected an integer"),
        ({"method": "loft"}, r"^method is 'loft', expected one of .*; did you mean loftq\?$"),
        ({"method": "gptq"}, r"^method 'gptq' works on the layer's inputs, but there are no statistics of them; give"),
        ({"svd": "fast"}, r"^svd is 'fast', expected one of auto, exact, block$"),
        ({"lora_alpha": 0}, r"^lora_alpha is 0, expected a positive number"),
        ({"lora_alpha": -4}, r"^lora_alpha is -4, expected a positive number"),
        ({"lora_alpha": math.nan}, r"^lora_alpha is nan, expected a positive number"),
        ({"lora_alpha": math.inf}, r"^lora_alpha is inf, expected a positive"),
        ({"lora_alpha": "16"}, r"^lora_alpha is '16', expected a positive number"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_invalid_settings_are_refused_in_one_sentence(setting, message):
    with pytest.raises(ConfigError, match=message) as caught:
        decompose(gaussian(4, 8), QuantSpec(), **{"rank": 2, **setting})
    assert "\n" not in str(caught.value)
    assert ". " not in str(caught.value)


def test_non_finite_weight_is_refused():
    weight = gaussian(4, 8)
    weight[1, 2] = torch.nan
    with pytest.raises(WeightError, match="1 NaN and 0 infinite"):
        decompose(weight, QuantSpec(), rank=2)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("method", ["loftq", "loftq-svd-first"])
def test_work_space(method, bits):
    """Two matrices of the weight's size beside it, codes of a byte an element, and thin factors."""
    weight = torch.randn(1024, 2048, generator=torch.Generator().manual_seed(0))
    with LiveBytes() as memory:
        decompose(weight, QuantSpec(bits), rank=16, num_iter=3, method=method)
    assert memory.peak < 3 * weight.nbytes, memory.peak / weight.nbytes


@pytest.mark.parametrize("default", DEFAULTS, ids=str)
@pytest.mark.parametrize("method", ["loftq", "qlora", "loftq-data"])
def test_defaults_of_torch_do_not_matter(method, default):
    weight, inputs = gaussian(40, 64), statistics_for(40, 64)

    def result() -> Decomposition:
        options = {
            "num_iter": 2,
            "method": method,
            "importance": replace(inputs),
            "svd": "block",
        }  # without what it has cached
        return decompose(weight, QuantSpec(2), rank=4, **options)

    expected = result()
    with torch_default(default):
        found = result()
    assert same(found, expected)
    assert found.lora_A.dtype == found.lora_B.dtype == torch.float32
