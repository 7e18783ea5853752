"""Coordinate descent whose rows are coupled by the second moment of the gradients in the outputs."""

from __future__ import annotations

import pytest
import torch
from rounding_problems import Problem, State, descended, in_double, problem, start
from torch import Tensor

from loftq import kernels
from loftq.codec.codebook import thresholds
from loftq.config import BITS, CODEBOOKS
from loftq.kernels import reference

widths = pytest.mark.parametrize("bits", BITS, ids=lambda bits: f"{bits}bit")
codebooks = pytest.mark.parametrize("name", CODEBOOKS)


def coupling_of(rows: int) -> Tensor:
    """The second moment of gradients in the outputs."""
    mixed = torch.randn(3 * rows, rows, generator=torch.Generator().manual_seed(3)).double()
    mixed = mixed + 0.5 * mixed[:, :1]
    return (mixed.T @ mixed / (3 * rows) + 0.3 * torch.eye(rows, dtype=torch.float64)).float()


def coupled(p: Problem, coupling: Tensor, block_size: int, refit: bool, double: bool = False) -> State:
    state = start(p, block_size)
    _, scale, codes, dense = in_double(state) if double else state
    function = reference.descend_coupled if double else kernels.descend_coupled
    weight, hessian, zero, levels, coupling = (
        in_double((p.weight, p.hessian, p.zero, p.levels, coupling))
        if double
        else (p.weight, p.hessian, p.zero, p.levels, coupling)
    )
    error = weight - dense
    before = error.clone()
    function(error, hessian, coupling, scale, zero, levels, thresholds(levels), block_size, codes, dense, refit)
    assert torch.equal(error, before)
    return State(error, scale, codes, dense)


def coupled_cost(p: Problem, coupling: Tensor, dense: Tensor) -> float:
    error = p.weight.double() - dense.double()
    return float(((coupling.double() @ error @ p.hessian.double()) * error).sum())


@pytest.mark.parametrize("name", ["nf", "uniform"])
@widths
@pytest.mark.parametrize("refit", [False, True], ids=["codes", "codes+scales"])
def test_coupled_descent_equals_its_definition_and_never_raises_the_objective(refit, bits, name):
    rows, n, block_size = 70, 40, 32  # more rows than are visited at once, a ragged last block
    p, coupling = problem(rows, n, block_size, name, bits), coupling_of(rows)
    found, defined = (coupled(p, coupling, block_size, refit, double) for double in (False, True))
    before = coupled_cost(p, coupling, start(p, block_size).dense)
    ours, theirs = (coupled_cost(p, coupling, state.dense) for state in (found, defined))
    assert ours <= before * (1 + 1e-5), f"{ours} after, {before} before"
    # a tie that is rounded otherwise moves all rows after it
    assert ours == pytest.approx(theirs, rel=2e-2)
    first = (
        int((found.codes != defined.codes).any(1).int().argmax()) if bool((found.codes != defined.codes).any()) else 70
    )
    assert bits == 8 or first > 0, "the first row differs already"
    torch.testing.assert_close(found.scale[:first].double(), defined.scale[:first], rtol=2e-4, atol=1e-5)
    values = p.value(found.codes, found.scale, block_size)
    size = float(p.weight.abs().max()) + float(found.dense.abs().max())
    assert float((found.dense - values).abs().max()) <= 2**-20 * size * (2**bits if p.zero is not None else 1)


@codebooks
@widths
@pytest.mark.parametrize("refit", [False, True], ids=["codes", "codes+scales"])
def test_descent_coupled_by_the_identity_is_descent(refit, bits, name):
    rows, n, block_size = 9, 131, 64
    p = problem(rows, n, block_size, name, bits)
    alone, together = descended(p, block_size, 1, refit), coupled(p, torch.eye(rows), block_size, refit)
    assert torch.equal(alone.codes, together.codes)
    torch.testing.assert_close(alone.scale, together.scale, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(alone.dense, together.dense, rtol=1e-6, atol=1e-6)
