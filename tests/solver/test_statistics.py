"""Which statistics a method needs, what happens without, and statistics that belong to no layer."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from made_up_inputs import assert_sound, gaussian, same, statistics_for, true_dense

from loftq.config import CODEBOOKS, METHODS, QuantSpec
from loftq.errors import ConfigError, WeightError
from loftq.solver import decompose
from loftq.solver.importance import InputStatistics
from loftq.solver.methods import METHODS as TABLE

pytestmark = pytest.mark.usefixtures("one_thread")

AWARE = [name for name in METHODS if TABLE[name].needs_inputs]

every_method = pytest.mark.parametrize("method", METHODS)
aware_methods = pytest.mark.parametrize("method", AWARE)


def second_moment(n: int) -> torch.Tensor:
    return statistics_for(1, n).second_moment


# --- which statistics ----------------------------------------------------------------------------------------------


def test_default_method_follows_the_statistics():
    weight = gaussian(20, 64)
    assert decompose(weight, QuantSpec(2), rank=4).method == "loftq"
    for bits, method in ((2, "loftq-data"), (3, "loftq-data-zero"), (4, "loftq-data-zero")):
        assert decompose(weight, QuantSpec(bits), rank=4, importance=statistics_for(20, 64)).method == method


@every_method
def test_moment_alone_is_enough_where_no_more_is_needed(method):
    weight, statistics = gaussian(20, 64), statistics_for(20, 64)
    fixed = {"rank": 4, "num_iter": 1, "method": method}
    if method in ("lqer", "lq-lora"):
        with pytest.raises(ConfigError, match=f"^method '{method}' needs .*, which these statistics lack; calibrate"):
            decompose(weight, QuantSpec(2), importance=statistics.second_moment, **fixed)
        return
    alone = decompose(weight, QuantSpec(2), importance=statistics.second_moment, **fixed)
    whole = decompose(weight, QuantSpec(2), importance=statistics, **fixed)
    assert same(alone, whole) or method == "auto"


@every_method
def test_diagonal_moments(method):
    weight, statistics = gaussian(30, 80), statistics_for(30, 80, diagonal=True)
    result = decompose(weight, QuantSpec(2), rank=5, num_iter=2, method=method, importance=statistics)
    assert_sound(weight, result, 5)
    diagonal = statistics.second_moment.double()
    if TABLE[method].metric == "full" and method != "auto":
        damping = TABLE[method].damping
        counts = (1 - damping) * diagonal / diagonal.mean() + damping
        norms = [float((e.square() * counts).sum().sqrt()) for e in (weight - true_dense(result), weight.double())]
        assert result.objective == pytest.approx(norms[0] / norms[1], rel=1e-4)


@pytest.mark.parametrize("svd", ["auto", "exact"])
def test_diagonal_moment_makes_qera_its_approximation(svd):
    weight, statistics = gaussian(30, 80), statistics_for(30, 80, diagonal=True)
    fixed = {"rank": 5, "importance": statistics, "svd": svd}
    exact, approximate = (decompose(weight, QuantSpec(2), method=m, **fixed) for m in ("qera", "qera-approx"))
    assert same(exact, approximate)


UNINFORMATIVE = {
    "tokens=0": {"tokens": 0},
    "zeros": {"second_moment": torch.zeros(64, 64)},
    "zero-diagonal": {"second_moment": torch.zeros(64)},
}
# what is left of each without statistics
WITHOUT = {"qera": "loftq", "qera-approx": "loftq", "lqer": "loftq", "cloq": "loftq", "gptq": "rtn"}


@aware_methods
@pytest.mark.parametrize("kind", UNINFORMATIVE)
def test_layer_that_saw_nothing_falls_back_to_the_weight_error(kind, method):
    weight = gaussian(20, 64)
    statistics = InputStatistics(**{"second_moment": torch.eye(64) * 3, **UNINFORMATIVE[kind]})
    result = decompose(weight, QuantSpec(2), rank=4, num_iter=2, method=method, importance=statistics)
    assert_sound(weight, result, 4)
    if method != "gptq":  # which is plain quantization, listed twice
        assert result.objectives == result.errors
    if method in WITHOUT:
        weight_only = decompose(weight, QuantSpec(2), rank=4, num_iter=1, method=WITHOUT[method])
        assert same(result, weight_only)
    if method == "loftq-data":
        assert same(result, decompose(weight, QuantSpec(2), rank=4, num_iter=2, method="qpissa"))
    if method == "lq-lora":
        assert same(result, decompose(weight, QuantSpec(2), rank=4, num_iter=2, method="loftq-svd-first"))


@pytest.mark.parametrize(("method", "weight_only"), [("qera", "loftq"), ("qera-approx", "loftq"), ("lqer", "loftq")])
def test_damping_of_1_is_the_weight_error(minilm_layer2, minilm_statistics, method, weight_only):
    weight, statistics = minilm_layer2["attention.self.key"], minilm_statistics["attention.self.key"]
    fixed = {"rank": 16, "num_iter": 1}
    result = decompose(weight, QuantSpec(2), method=method, importance=statistics, damping=1.0, **fixed)
    expected = decompose(weight, QuantSpec(2), method=weight_only, **fixed)
    assert same(result, expected)
    assert result.objectives == pytest.approx(expected.errors, rel=1e-6)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize(("method", "weight_only"), [("cloq", "loftq"), ("gptq", "rtn")])
def test_damping_of_1_makes_feedback_round_to_nearest(method, weight_only, codebook):
    weight, statistics = gaussian(40, 100), statistics_for(40, 100)
    spec, fixed = QuantSpec(2, codebook), {"rank": 6, "num_iter": 1}
    result = decompose(weight, spec, method=method, importance=statistics, damping=1.0, **fixed)
    assert same(result, decompose(weight, spec, method=weight_only, **fixed))


@aware_methods
@pytest.mark.parametrize("damping", [0.0, None], ids=["undamped", "damped"])
@pytest.mark.parametrize("kind", ["rank-5", "dead-inputs", "one-input", "constant"])
def test_singular_moments(kind, damping, method):
    n = 70
    few = gaussian(5, n) if kind == "rank-5" else gaussian(300, n)
    if kind == "dead-inputs":
        few[:, 10:20] = 0
    elif kind == "one-input":
        few[:, 1:] = 0
    elif kind == "constant":
        few = torch.ones(3, n)
    statistics = InputStatistics(
        few.T @ few / len(few),
        mean_abs=few.abs().mean(0),
        fisher_rows=torch.rand(30, generator=torch.Generator().manual_seed(0)),
        fisher_columns=few.abs().mean(0),
    )
    weight = gaussian(30, n, 8)
    fixed = {"rank": 4, "num_iter": 2, "importance": statistics, "damping": damping}
    result = decompose(weight, QuantSpec(2), method=method, **fixed)
    assert bool(result.lora_A.isfinite().all() & result.lora_B.isfinite().all())
    assert all(map(math.isfinite, [*result.errors, *result.objectives]))
    assert result.objective <= result.objectives[0] * (1 + 1e-5)
    if damping is None and method in ("cloq", "caldera", "loftq-data", "gptq"):
        assert_sound(weight, result, 4)


def test_only_ours_follows_the_drift():
    weight, statistics = gaussian(20, 64), statistics_for(20, 64)
    drift = 0.2 * gaussian(64, 64, 9)
    followed = InputStatistics(
        statistics.second_moment,
        mean_abs=statistics.mean_abs,
        drift=drift,
        fisher_rows=statistics.fisher_rows,
        fisher_columns=statistics.fisher_columns,
    )
    for method in METHODS:
        fixed = {"rank": 4, "num_iter": 1, "method": method}
        results = [decompose(weight, QuantSpec(2), importance=given, **fixed) for given in (statistics, followed)]
        assert same(*results) == (method not in ("loftq-data", "loftq-data-zero", "auto")), method


# --- users' mistakes -----------------------------------------------------------------------------------------------


def one_sentence(error: Exception) -> bool:
    return "\n" not in str(error) and ". " not in str(error)


@aware_methods
def test_method_without_statistics(method):
    with pytest.raises(
        ConfigError, match=f"^method '{method}' works on the layer's inputs, but there are no"
    ) as caught:
        decompose(gaussian(4, 8), QuantSpec(), rank=2, method=method)
    assert one_sentence(caught.value)


@every_method
@pytest.mark.parametrize("moment", [torch.eye(9), torch.ones(7), torch.ones(8, 9)], ids=lambda m: str(tuple(m.shape)))
def test_statistics_of_another_layer(method, moment):
    with pytest.raises(WeightError, match=r"second moment has shape .*, expected \(8, 8\) or \(8,\)") as caught:
        decompose(gaussian(4, 8), QuantSpec(), rank=2, method=method, importance=moment)
    assert one_sentence(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_moments_that_are_none(value):
    moment = torch.eye(8)
    moment[3, 3] = value
    for given_moment in (moment, moment.diagonal().clone()):
        with pytest.raises(WeightError, match="NaN, infinite or negative") as caught:
            decompose(gaussian(4, 8), QuantSpec(), rank=2, importance=given_moment)
        assert one_sentence(caught.value)


@pytest.mark.parametrize("missing", ["fisher_rows", "fisher_columns"])
def test_lq_lora_without_gradients(missing):
    complete = statistics_for(4, 8)
    fields = {"fisher_rows": complete.fisher_rows, "fisher_columns": complete.fisher_columns, missing: None}
    with pytest.raises(ConfigError, match=r"^method 'lq-lora' needs gradients, which these statistics lack") as caught:
        decompose(
            gaussian(4, 8),
            QuantSpec(),
            rank=2,
            method="lq-lora",
            importance=InputStatistics(complete.second_moment, **fields),
        )
    assert one_sentence(caught.value)


@pytest.mark.parametrize("damping", [-0.1, 1.1, math.nan, "0.1", True])
def test_damping_out_of_range(damping):
    with pytest.raises(ConfigError, match=r"^damping is .*, expected a number from 0 to 1") as caught:
        decompose(gaussian(4, 8), QuantSpec(), rank=2, importance=torch.eye(8), damping=damping)
    assert one_sentence(caught.value)


# --- the statistics themselves ---------------------------------------------------------------------------------------------


def test_metric_is_computed_once():
    statistics = InputStatistics(second_moment(40))
    first = statistics.metric("full", 0.02)
    assert statistics.metric("full", 0.02) is first
    assert statistics.metric("full", 0.5) is not first
    assert statistics.metric("diagonal", 0.02) is not first
    assert InputStatistics(second_moment(40)).metric("full", 0.02) is not first


def test_metric_is_computed_once_by_threads(monkeypatch):
    from loftq.solver import importance

    calls = []
    compute = importance._metric
    monkeypatch.setattr(importance, "_metric", lambda *args: calls.append(args) or compute(*args))
    statistics = InputStatistics(second_moment(60))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: statistics.metric("full", 0.0), range(16)))
    assert len(calls) == 1
    assert all(metric is found[0] for metric in found)


def test_diagonal_property_and_informative():
    moment = second_moment(10)
    assert torch.equal(InputStatistics(moment).diagonal, moment.diagonal())
    assert torch.equal(InputStatistics(moment.diagonal().clone()).diagonal, moment.diagonal())
    assert InputStatistics(moment).informative
    assert not InputStatistics(moment, tokens=0).informative
    assert not InputStatistics(torch.zeros(10, 10)).informative
    assert not InputStatistics(torch.zeros(10)).informative


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        (torch.eye(9), r"second moment has shape \(9, 9\), expected \(8, 8\) or \(8,\); calibrate"),
        (torch.ones(9), r"second moment has shape \(9,\), expected \(8, 8\) or \(8,\)"),
        (torch.ones(8, 9), r"second moment has shape \(8, 9\), expected \(8, 8\)"),
        (torch.ones(1, 8, 8), r"second moment has shape \(1, 8, 8\), expected \(8, 8\)"),
        (torch.eye(8) * torch.nan, "NaN, infinite or negative elements"),
        (torch.full((8,), torch.inf), "NaN, infinite or negative elements"),
        (-torch.ones(8), "NaN, infinite or negative elements"),
        (-torch.eye(8), "NaN, infinite or negative elements"),
    ],
    ids=["larger", "larger-diagonal", "not-square", "3-d", "nan", "inf", "negative-diagonal", "negative"],
)
def test_statistics_of_another_layer_are_refused_in_one_sentence(moment, message):
    with pytest.raises(WeightError, match=message) as caught:
        InputStatistics(moment).check(8)
    assert "\n" not in str(caught.value)
    assert ". " not in str(caught.value)


def test_negative_elements_beside_the_diagonal_are_fine():
    moment = torch.eye(8)
    moment[0, 1] = moment[1, 0] = -0.5
    InputStatistics(moment).check(8)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mean_abs", torch.ones(9)),
        ("mean_abs", torch.full((8,), torch.nan)),
        ("drift", torch.eye(9)),
        ("drift", torch.eye(8) * torch.nan),
        ("fisher_columns", torch.ones(9)),
        ("fisher_columns", torch.full((8,), torch.nan)),
    ],
    ids=["mean-abs-shape", "mean-abs-nan", "drift-shape", "drift-nan", "fisher-shape", "fisher-nan"],
)
def test_other_statistics_are_checked_as_well(field, value):
    with pytest.raises(WeightError) as caught:
        InputStatistics(torch.eye(8), **{field: value}).check(8)
    assert "\n" not in str(caught.value)
