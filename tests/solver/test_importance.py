"""The metric of a layer's inputs: factors and order against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import transcription_gptq
from loftq.solver.importance import InputStatistics, Metric

pytestmark = pytest.mark.usefixtures("one_thread")

LAMBDAS = [0.0, 0.01 / 1.01, 0.02, 0.5, 1.0]
damped = pytest.mark.parametrize("damping", LAMBDAS, ids=lambda value: f"{value:.3g}")


def gaussian(rows: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))


def moment_of(n: int, tokens: int = 500, seed: int = 0) -> Tensor:
    x = gaussian(tokens, n, seed) * torch.exp(gaussian(1, n, seed + 1)) + gaussian(tokens, 1, seed + 2)
    return x.T @ x / tokens


def dense_factors(metric: Metric) -> tuple[np.ndarray, np.ndarray]:
    """P and P⁻¹ of the columns in order."""
    return metric.factor.double().numpy(), metric.inverse.double().numpy()


@damped
def test_factor_is_of_the_damped_moment_in_order(damping):
    moment = moment_of(90)
    metric = InputStatistics(moment).metric("full", damping)
    expected = transcription_gptq.blended(moment.double().numpy(), damping)
    # a floor of 1e-6 of the mean diagonal, and float32
    np.testing.assert_allclose(metric.hessian.numpy(), expected, atol=2e-6 * np.abs(expected).max())
    assert float(metric.hessian.diagonal().double().mean()) == pytest.approx(1, abs=2e-7)
    order = metric.order.numpy()
    assert sorted(order) == list(range(90))
    assert bool((metric.hessian.diagonal()[metric.order].diff() <= 0).all()), (
        "columns of large second moment come first"
    )
    P, inverse = dense_factors(metric)
    assert np.array_equal(P, np.triu(P))
    assert np.array_equal(inverse, np.triu(inverse))
    ordered = metric.hessian.double().numpy()[np.ix_(order, order)]
    np.testing.assert_allclose(P @ P.T, ordered, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_allclose(inverse @ P, np.eye(90), atol=1e-4)
    np.testing.assert_allclose(
        inverse.T @ inverse, np.linalg.inv(ordered), rtol=0, atol=1e-4 * np.abs(np.linalg.inv(ordered)).max()
    )
    assert metric.rows is None
    assert metric.drift is None


@damped
def test_norm_is_the_output_error(damping):
    moment, error = moment_of(70), gaussian(20, 70, 5)
    H = transcription_gptq.blended(moment.double().numpy(), damping)
    E = error.double().numpy()
    whitened = InputStatistics(moment).metric("full", damping).whiten(error)
    assert float(whitened.double().square().sum()) == pytest.approx(np.trace(E @ H @ E.T), rel=1e-5)


def test_norm_is_that_of_the_outputs_on_the_inputs():
    x, error = gaussian(300, 40), gaussian(9, 40, 1)
    moment = (x.double().T @ x.double() / 300).float()
    whitened = InputStatistics(moment).metric("full", 0.0).whiten(error)
    outputs = float((x.double() @ error.double().T).square().sum()) / 300
    # H is divided by its mean diagonal
    mean = float(moment.double().diagonal().mean())
    assert float(whitened.double().square().sum()) * mean == pytest.approx(outputs, rel=1e-5)


@pytest.mark.parametrize("kind", ["none", "full", "diagonal", "mean-abs", "fisher"])
def test_unwhitening_undoes_whitening(kind):
    moment = moment_of(60)
    statistics = InputStatistics(
        moment,
        mean_abs=moment.diagonal().sqrt() * 0.8,
        fisher_rows=0.1 + gaussian(20, 1, 3)[:, 0].abs(),
        fisher_columns=0.1 + gaussian(60, 1, 4)[:, 0].abs(),
    )
    metric = Metric() if kind == "none" else statistics.metric(kind, 0.02)
    error = gaussian(20, 60, 2)
    back = metric.unwhiten_rows(metric.unwhiten_columns(metric.whiten(error)))
    torch.testing.assert_close(back, error, rtol=0, atol=1e-5 * float(error.abs().max()))


@damped
def test_conditional_is_what_remains_after_the_later_columns(damping):
    moment = moment_of(50)
    metric = InputStatistics(moment).metric("full", damping)
    H = transcription_gptq.blended(moment.double().numpy(), damping)
    order = metric.order.numpy()
    expected = np.empty(50)
    for position, column in enumerate(order):
        later = order[position:]
        expected[column] = 1 / np.linalg.inv(H[np.ix_(later, later)])[0, 0]
    # the floor of 1e-6 shows where λ = 0 and a column is nearly determined by the others
    np.testing.assert_allclose(metric.conditional.numpy(), expected, rtol=2e-5, atol=4e-6)
    assert bool((metric.conditional <= metric.columns * (1 + 1e-5)).all())


def test_conditional_is_the_least_cost_of_a_unit_error():
    # min over the later columns' changes v of (e_j + v) H (e_j + v)ᵀ, by least squares in float64
    moment = moment_of(12)
    metric = InputStatistics(moment).metric("full", 0.02)
    H, order = transcription_gptq.blended(moment.double().numpy(), 0.02), metric.order.numpy()
    root = np.linalg.cholesky(H).T  # |root e|² = e H eᵀ
    for position, column in enumerate(order):
        later = order[position + 1 :]
        change = np.linalg.lstsq(root[:, later], -root[:, column], rcond=None)[0]
        cost = np.sum((root[:, column] + root[:, later] @ change) ** 2)
        assert float(metric.conditional[column]) == pytest.approx(cost, rel=2e-5, abs=4e-6)


@damped
@pytest.mark.parametrize("given", ["full", "diagonal"])
def test_diagonal_metric(given, damping):
    moment = moment_of(30)
    statistics = InputStatistics(moment if given == "full" else moment.diagonal().clone())
    for kind in ("diagonal",) if given == "full" else ("diagonal", "full"):
        metric = statistics.metric(kind, damping)
        diagonal = moment.diagonal().double()
        expected = (1 - damping) * diagonal / diagonal.mean() + damping
        for found in (metric.hessian, metric.columns, metric.conditional, metric.factor.square(), metric.inverse**-2):
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-6)
        assert metric.order is None


@damped
def test_mean_abs_metric(damping):
    mean_abs = gaussian(30, 1)[:, 0].abs() + 0.01
    metric = InputStatistics(moment_of(30), mean_abs=mean_abs).metric("mean-abs", damping)
    expected = (1 - damping) * mean_abs.square() / mean_abs.square().mean() + damping
    torch.testing.assert_close(metric.factor.square(), expected, rtol=1e-5, atol=2e-6)


def test_fisher_metric_weighs_rows_and_columns():
    rows, columns = gaussian(9, 1)[:, 0].abs() + 0.1, gaussian(30, 1, 1)[:, 0].abs() + 0.1
    metric = InputStatistics(moment_of(30), fisher_rows=rows, fisher_columns=columns).metric("fisher", 0.0)
    error = gaussian(9, 30, 2)
    expected = (rows / rows.mean())[:, None] * error * (columns / columns.mean())
    torch.testing.assert_close(metric.whiten(error), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", ["fisher_rows", "fisher_columns"])
def test_fisher_metric_of_a_layer_without_gradient_is_finite(which):
    given = {"fisher_rows": torch.ones(9), "fisher_columns": torch.ones(30)}
    given[which] = torch.zeros_like(given[which])
    metric = InputStatistics(moment_of(30), **given).metric("fisher", 0.0)
    assert bool(metric.whiten(torch.ones(9, 30)).isfinite().all())


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e20])
def test_magnitude_of_the_inputs_does_not_matter(scale):
    moment = moment_of(40)
    for value, kind in ((moment, "full"), (moment, "diagonal"), (moment.diagonal().clone(), "full")):
        plain, scaled = (InputStatistics(m).metric(kind, 0.02) for m in (value, value * scale))
        torch.testing.assert_close(scaled.factor, plain.factor, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(scaled.hessian, plain.hessian, rtol=1e-4, atol=1e-4)


def test_identity_is_exactly_the_identity():
    for damping in LAMBDAS:
        metric = InputStatistics(torch.eye(70)).metric("full", damping)
        for tensor in (metric.hessian, metric.factor, metric.inverse):
            assert torch.equal(tensor, torch.eye(70)), f"λ = {damping}"
        assert torch.equal(metric.order, torch.arange(70))


def singular_moments() -> dict[str, Tensor]:
    few = gaussian(7, 60)
    deficient = few.T @ few
    dead = moment_of(60)
    dead[:, 10:20] = 0
    dead[10:20] = 0
    one = torch.zeros(60, 60)
    one[3, 3] = 2.0
    indefinite = moment_of(60) - 1e-4 * torch.eye(60) * moment_of(60).diagonal().max()
    return {
        "rank-7": deficient,
        "dead-inputs": dead,
        "one-input": one,
        "constant": torch.ones(60, 60),
        "indefinite": indefinite,
    }


@pytest.mark.parametrize("damping", [0.0, 0.02])
@pytest.mark.parametrize("name", singular_moments())
def test_singular_moments_have_finite_factors(name, damping):
    moment = singular_moments()[name]
    metric = InputStatistics(moment, drift=0.1 * moment).metric("full", damping)
    for field in ("hessian", "factor", "inverse", "drift", "conditional"):
        assert bool(getattr(metric, field).isfinite().all()), field
    P, inverse = dense_factors(metric)
    ordered = metric.hessian.double().numpy()[np.ix_(metric.order.numpy(), metric.order.numpy())]
    np.testing.assert_allclose(P @ P.T, ordered, atol=1e-6 * np.abs(ordered).max())
    np.testing.assert_allclose(inverse @ P, np.eye(60), atol=2e-3)
    assert bool((metric.conditional > 0).all())


# --- gradients in the outputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("row_damping", [0.0, 0.3, 1.0])
def test_rows_are_weighted_by_the_output_moment(row_damping):
    moment, output, error = moment_of(40), moment_of(25, seed=9), gaussian(25, 40, 5)
    shared = InputStatistics(moment)
    metric = shared.of_layer(output_moment=output).metric("full", 0.02, row_damping)
    H = transcription_gptq.blended(moment.double().numpy(), 0.02)
    G = transcription_gptq.blended(output.double().numpy(), row_damping)
    E = error.double().numpy()
    whitened = metric.whiten(error)
    assert float(whitened.double().square().sum()) == pytest.approx(np.trace(G @ E @ H @ E.T), rel=1e-5)
    back = metric.unwhiten_rows(metric.unwhiten_columns(whitened))
    torch.testing.assert_close(back, error, rtol=0, atol=2e-5 * float(error.abs().max()))
    np.testing.assert_allclose(metric.row_hessian.numpy(), G, atol=3e-6 * np.abs(G).max())
    # the inputs' factors are those of every layer that shares them
    plain = shared.metric("full", 0.02)
    assert metric.factor is plain.factor
    assert metric.inverse is plain.inverse
    assert plain.row_hessian is None
    assert shared.of_layer(output_moment=output).metric("full", 0.02) is plain


@pytest.mark.parametrize("row_damping", [None, 0.3])
@pytest.mark.parametrize("guidance", [0.25, 1.0])
def test_inputs_are_blended_with_those_the_gradients_count(guidance, row_damping):
    moment, guided, output = moment_of(40), 7 * moment_of(40, seed=4), moment_of(25, seed=9)
    shared = InputStatistics(moment)
    layer = shared.of_layer(output_moment=output, guided_moment=guided)
    metric = layer.metric("full", 0.02, row_damping, guidance)
    plain, weighted = (m.double().numpy() / np.trace(m.double().numpy()) for m in (moment, guided))
    expected = transcription_gptq.blended((1 - guidance) * plain + guidance * weighted, 0.02)
    np.testing.assert_allclose(metric.hessian.numpy(), expected, atol=3e-6 * np.abs(expected).max())
    assert (metric.row_hessian is None) == (row_damping is None)
    assert layer.metric("full", 0.02, row_damping, guidance) is metric
    # other metrics know nothing of it
    assert layer.metric("full", 0.02) is shared.metric("full", 0.02)
    assert torch.equal(layer.metric("full", 0.02, row_damping).hessian, shared.metric("full", 0.02).hessian)
    assert torch.equal(layer.metric("diagonal", 0.02, None, guidance).hessian, shared.metric("diagonal", 0.02).hessian)


def test_drifted_inputs_are_not_guided():
    drifted = InputStatistics(moment_of(40), drift=0.1 * moment_of(40, seed=3), guided_moment=moment_of(40, seed=4))
    metric = drifted.metric("full", 0.02, None, 0.5)
    assert metric.drift is not None
    assert torch.equal(metric.hessian, InputStatistics(moment_of(40)).metric("full", 0.02).hessian)


def test_output_moment_of_zeros_is_left_out():
    statistics = InputStatistics(moment_of(40), output_moment=torch.zeros(25, 25))
    assert statistics.metric("full", 0.02, 0.3).row_hessian is None


@pytest.mark.parametrize("name", singular_moments())
def test_singular_output_moments_have_finite_factors(name):
    statistics = InputStatistics(moment_of(40), output_moment=singular_moments()[name])
    metric = statistics.metric("full", 0.02, 0.0)
    assert bool(metric.row_factor.isfinite().all())
    assert bool(metric.row_inverse.isfinite().all())


# --- drift ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.02, 0.3, 1.0])
def test_drift_target_is_the_least_squares_solution(damping):
    tokens, n, rows = 400, 24, 9
    clean = gaussian(tokens, n) * torch.exp(0.5 * gaussian(1, n, 1))
    got = 0.9 * clean + 0.2 * clean @ gaussian(n, n, 2) / n**0.5 + 0.3 * gaussian(tokens, n, 3)
    W = gaussian(rows, n, 4)
    x, x_clean, W64 = (t.double().numpy() for t in (got, clean, W))
    moment = x.T @ x / tokens
    statistics = InputStatistics(
        torch.from_numpy(moment).float(), drift=torch.from_numpy((x_clean - x).T @ x / tokens).float()
    )
    metric = statistics.metric("full", damping)
    target = (W + W @ metric.drift).double().numpy()

    # rows of a least-squares problem: the samples, weighted, and λ |W - M|²
    share = np.sqrt((1 - damping) * n / np.trace(moment) / tokens)
    system = np.concatenate([share * x, np.sqrt(damping) * np.eye(n)])
    right = np.concatenate([share * x_clean @ W64.T, np.sqrt(damping) * W64.T])
    expected = np.linalg.lstsq(system, right, rcond=None)[0].T
    np.testing.assert_allclose(target, expected, atol=2e-4 * np.abs(expected).max())
    if damping == 1:
        assert np.array_equal(target, W64)
    if damping == 0:  # and it does what it is for
        assert np.square(x @ target.T - x_clean @ W64.T).sum() < 0.9 * np.square(x @ W64.T - x_clean @ W64.T).sum()


def test_drift_is_left_out_of_diagonal_metrics():
    moment = moment_of(20)
    assert InputStatistics(moment, drift=moment).metric("diagonal", 0.0).drift is None
    assert InputStatistics(moment.diagonal().clone(), drift=moment).metric("full", 0.0).drift is None
