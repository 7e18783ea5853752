"""Triton kernels that choose codes, scales and levels, against their definition and the compiled loops."""

from __future__ import annotations

import pytest
import torch
from rounding_problems import problem, start
from test_levels_by_row import levels_by_row
from test_reference import (
    FACTORS,
    assert_same_choices,
    column_counts,
    constant_blocks,
    levels_for,
    random_scales,
    random_weight,
    squared_error,
    wrong_preference,
)
from triton_side import by_triton

pytest.importorskip("triton", reason="needs Triton: pip install loftq[triton]")

import loftq
from loftq import kernels
from loftq.codec.codebook import codebook, thresholds
from loftq.config import BITS, CODEBOOKS
from loftq.kernels import reference
from loftq.solver.importance import InputStatistics

ROWS, COLUMNS, BLOCK = 7, 131, 32
widths = pytest.mark.parametrize("bits", BITS, ids=lambda bits: f"{bits}bit")
counted = pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])


@pytest.mark.parametrize("with_zero", [False, True], ids=["scale", "scale+zero"])
@widths
def test_encode(bits, with_zero):
    weight, levels = random_weight(ROWS, COLUMNS), levels_for(bits, with_zero)
    args = (weight, *random_scales(ROWS, COLUMNS, BLOCK, with_zero), levels, thresholds(levels), BLOCK)
    different = int((by_triton(kernels.encode, *args) != reference.encode(*args)).sum())
    assert different == 0, f"{different} of {weight.numel()} codes differ"


@widths
def test_encode_ties_go_to_the_lower_level(bits):
    levels = codebook("uniform", bits)
    weight = thresholds(levels)[None, :].contiguous()
    args = (weight, torch.ones(1, -(-weight.shape[1] // 32)), None, levels, thresholds(levels), 32)
    assert torch.equal(by_triton(kernels.encode, *args), torch.arange(2**bits - 1, dtype=torch.uint8)[None, :])


@counted
@widths
def test_search_scale(bits, weighted):
    weight, counts, levels = random_weight(ROWS, COLUMNS), column_counts(COLUMNS, weighted), codebook("nf", bits)
    args = (levels, thresholds(levels), torch.cat([FACTORS, -FACTORS]), 1, BLOCK)
    found, defined = (
        by_triton(kernels.search_scale, weight, *args, counts),
        reference.search_scale(weight, counts, *args),
    )
    errors = [squared_error(weight, counts, scale, None, levels, BLOCK) for scale in (found, defined)]
    assert abs(errors[0] - errors[1]) <= wrong_preference(BLOCK) * float((weight.double().square() * counts).sum())
    assert_same_choices(found, defined, constant_blocks(weight, BLOCK))


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("name", CODEBOOKS)
@widths
def test_every_codebook(bits, name, block_size):
    weight, levels = random_weight(ROWS, 200), codebook(name, bits)
    scale, _ = random_scales(ROWS, 200, block_size, False)
    stored = (weight, scale, None, levels, thresholds(levels), block_size)
    assert torch.equal(by_triton(kernels.encode, *stored), reference.encode(*stored))
    args = (levels, thresholds(levels), torch.cat([FACTORS, -FACTORS]), 1, block_size)
    found = by_triton(kernels.search_scale, weight, *args)
    defined = reference.search_scale(weight, torch.ones(200), *args)
    errors = [squared_error(weight, torch.ones(200), s, None, levels, block_size) for s in (found, defined)]
    assert abs(errors[0] - errors[1]) <= wrong_preference(block_size) * float(weight.double().square().sum())


@counted
@widths
def test_search_affine(bits, weighted):
    weight, counts, levels = random_weight(ROWS, COLUMNS), column_counts(COLUMNS, weighted), codebook("uniform", bits)
    args = (levels, thresholds(levels), FACTORS, 2, BLOCK)
    found = by_triton(kernels.search_affine, weight, *args, counts)
    defined = reference.search_affine(weight, counts, *args)
    errors = [squared_error(weight, counts, *pair, levels, BLOCK) for pair in (found, defined)]
    assert abs(errors[0] - errors[1]) <= wrong_preference(BLOCK) * float((weight.double().square() * counts).sum())
    if bits < 8:  # see tests/kernels/test_reference.py
        assert_same_choices(found[0], defined[0])


@counted
@widths
def test_level_moments(bits, weighted):
    weight, counts, levels = random_weight(ROWS, COLUMNS), column_counts(COLUMNS, weighted), codebook("nf", bits)
    scale, _ = random_scales(ROWS, COLUMNS, BLOCK, False)
    codes = reference.encode(weight, scale, None, levels, thresholds(levels), BLOCK)
    for by_row in (False, True):
        args = (scale, codes, 2**bits, BLOCK)
        found = by_triton(kernels.level_moments, weight, *args, counts, by_row)
        for got, expected in zip(found, reference.level_moments(weight, counts, *args, by_row), strict=True):
            assert got.dtype == torch.float64
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


@widths
def test_levels_of_each_rows_own(bits):
    levels = levels_by_row(bits)
    p = problem(ROWS, 83, BLOCK, "lloyd", bits)
    args = (p.weight, p.scale, None, levels, thresholds(levels), BLOCK)
    assert torch.equal(by_triton(kernels.encode, *args), reference.encode(*args))
    search = (levels, thresholds(levels), torch.tensor([0.5, 1.0, -0.5, -1.0]), 1, BLOCK)
    found = by_triton(kernels.search_scale, p.weight, *search)
    torch.testing.assert_close(found, reference.search_scale(p.weight, torch.ones(83), *search), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("name", "bits"), [("nf", 2), ("uniform", 3), ("rows", 3), ("lloyd", 4), ("nf", 8)])
def test_feedback_rounds_as_the_compiled_loop(name, bits):
    n = 43
    p = problem(ROWS, n, BLOCK, "lloyd" if name == "rows" else name, bits)
    levels = levels_by_row(bits) if name == "rows" else p.levels

    def feedback(work, inverse, order, scale, zero, levels, weight):
        codes = torch.full((ROWS, n), 255, dtype=torch.uint8, device=work.device)
        dense, errors = torch.full_like(work, torch.nan), []
        for begin in range(0, n, BLOCK):
            end = min(begin + BLOCK, n)
            constants = (inverse, order, scale, zero, levels, thresholds(levels), BLOCK)
            errors.append(kernels.feedback(work, *constants, (begin, end), codes, dense))
            work[:, end:] -= errors[-1] @ inverse[begin:end, end:]
        return codes, dense, torch.cat(errors, 1)

    args = (p.inverse, p.order, p.scale, p.zero, levels, p.weight)
    codes, dense, errors = by_triton(feedback, p.weight[:, p.order].contiguous(), *args)
    expected = feedback(p.weight[:, p.order].contiguous(), *args)
    same = (codes == expected[0]).all(1)  # a row parts for good where its rounding meets a tie
    assert int((~same).sum()) <= 1, f"{int((~same).sum())} of {ROWS} rows differ"
    torch.testing.assert_close(dense[same], expected[1][same], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(errors[same], expected[2][same], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(p.costs(dense), errors.double().square().sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "bits", "refit"), [("nf", 2, True), ("uniform", 3, True), ("rows", 3, True), ("lloyd", 4, False)]
)
def test_descent_arrives_where_the_compiled_loop_does(name, bits, refit):
    p = problem(ROWS, 43, BLOCK, "lloyd" if name == "rows" else name, bits)
    state = start(p, BLOCK)
    levels = p.levels.expand(ROWS, -1).contiguous() if name == "rows" else p.levels

    def descend(gradient, scale, codes, dense, hessian, zero, levels):
        gradient, scale, codes, dense = (t.clone() for t in (gradient, scale, codes, dense))
        constants = (zero, levels, thresholds(levels), BLOCK)
        kernels.descend(gradient, hessian, scale, *constants, codes, dense, 2, refit)
        return gradient, scale, codes, dense

    args = (*state, p.hessian, p.zero, levels)
    gradient, scale, codes, dense = by_triton(descend, *args)
    _, scale_expected, codes_expected, dense_expected = descend(*args)
    # one block after the other the gradient is summed in another order: a tie may fall otherwise
    same = (codes == codes_expected).all(1)
    assert int((~same).sum()) <= 1, f"{int((~same).sum())} of {ROWS} rows differ"
    torch.testing.assert_close(scale[same], scale_expected[same], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dense[same], dense_expected[same], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, (p.weight - dense) @ p.hessian, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(dense.double(), p.value(codes, scale, BLOCK), rtol=1e-4, atol=1e-4)
    assert bool((p.costs(dense) <= p.costs(state.dense) * (1 + 1e-6)).all())


def test_coupled_descent_is_the_compiled_loops():
    p = problem(ROWS, 83, BLOCK, "lloyd", 3)
    mixed = torch.randn(40, ROWS, generator=torch.Generator().manual_seed(5))

    def descend(error, hessian, coupling, scale, codes, dense, levels):
        scale, codes, dense = (t.clone() for t in (scale, codes, dense))
        constants = (None, levels, thresholds(levels), BLOCK)
        kernels.descend_coupled(error, hessian, coupling, scale, *constants, codes, dense, True)
        return scale, codes, dense

    state = start(p, BLOCK)
    args = (p.weight - state.dense, p.hessian, mixed.T @ mixed / 40, p.scale, state.codes, state.dense, p.levels)
    assert all(map(torch.equal, by_triton(descend, *args), descend(*args)))


SPECS = {
    "default": loftq.QuantSpec(bits=2),
    "published": loftq.QuantSpec(bits=4, **loftq.PUBLISHED),
    "affine": loftq.QuantSpec(bits=3, codebook="uniform"),
    "by-row": loftq.QuantSpec(bits=3, codebook="lloyd-channel"),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_solver_finds_the_same(spec):
    """The whole decomposition, once by Triton's kernels and once by the compiled ones."""
    weight = torch.randn(9, 136, generator=torch.Generator().manual_seed(3))
    found = by_triton(solved, weight, spec)
    expected = solved(weight, spec)
    assert found[0] == pytest.approx(expected[0], rel=1e-3)
    assert float((found[1] == expected[1]).float().mean()) > 0.98
    torch.testing.assert_close(found[2], found[3])  # what the layer reports is what its tensors stand for


def solved(weight, spec, **options):
    result = loftq.decompose(weight, spec, rank=4, num_iter=1, **options)
    error = float((weight - result.dequantize()).norm() / weight.norm())
    return result.error, result.quantized.codes(), torch.tensor(error), torch.tensor(result.error)


def test_the_data_aware_solver_finds_the_same():
    weight = torch.randn(9, 40, generator=torch.Generator().manual_seed(3))
    inputs = torch.randn(300, 40, generator=torch.Generator().manual_seed(4)) * torch.linspace(0.3, 3, 40)
    spec = loftq.QuantSpec(bits=2, block_size=32)

    def objective(weight, moment):
        result = loftq.decompose(weight, spec, rank=4, num_iter=1, importance=InputStatistics(moment, tokens=300))
        return torch.tensor(result.objective)

    moment = inputs.T @ inputs / 300
    torch.testing.assert_close(by_triton(objective, weight, moment), objective(weight, moment), rtol=2e-2, atol=0)
