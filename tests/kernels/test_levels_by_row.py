"""With levels of each row's own every kernel does to a matrix what it does to its rows one by one."""

from __future__ import annotations

import pytest
import torch
from rounding_problems import problem
from torch import Tensor

from loftq import kernels
from loftq.codec.codebook import codebook, thresholds
from loftq.kernels import reference

BLOCK = 32
ROWS, COLUMNS = 7, 83

widths = pytest.mark.parametrize("bits", [2, 3, 4])
sides = pytest.mark.parametrize("side", [kernels, reference], ids=["compiled", "reference"])


def levels_by_row(bits: int) -> Tensor:
    """Ascending levels that differ from row to row."""
    generator = torch.Generator().manual_seed(bits)
    gaps = codebook("lloyd", bits).diff() * (0.5 + torch.rand(ROWS, 2**bits - 1, generator=generator))
    levels = torch.cat([torch.zeros(ROWS, 1), gaps.cumsum(1)], 1)
    return (levels - levels.mean(1, keepdim=True)) / levels.std(1, keepdim=True)


def each(levels: Tensor) -> list[tuple[slice, Tensor, Tensor]]:
    return [(slice(r, r + 1), levels[r], thresholds(levels[r])) for r in range(ROWS)]


@sides
@widths
def test_encode_and_dequantize(bits, side):
    p, levels = problem(ROWS, COLUMNS, BLOCK, "lloyd", bits), levels_by_row(bits)
    codes = side.encode(p.weight, p.scale, None, levels, thresholds(levels), BLOCK)
    dense = side.dequantize(kernels.pack(codes, bits), p.scale, levels, None, bits, BLOCK, COLUMNS)
    for row, own, borders in each(levels):
        expected = side.encode(p.weight[row], p.scale[row], None, own, borders, BLOCK)
        assert torch.equal(codes[row], expected)
        packed = kernels.pack(expected, bits)
        assert torch.equal(dense[row], side.dequantize(packed, p.scale[row], own, None, bits, BLOCK, COLUMNS))


@sides
@widths
def test_search_scale(bits, side):
    p, levels = problem(ROWS, COLUMNS, BLOCK, "lloyd", bits), levels_by_row(bits)
    factors = torch.tensor([0.4, 0.7, 1.0, -0.4, -0.7, -1.0])
    counts = torch.linspace(0.5, 2.0, COLUMNS)

    def found(weight: Tensor, own: Tensor, borders: Tensor) -> Tensor:
        if side is reference:
            return reference.search_scale(weight, counts, own, borders, factors, 1, BLOCK)
        return kernels.search_scale(weight, own, borders, factors, 1, BLOCK, counts)

    together = found(p.weight, levels, thresholds(levels))
    for row, own, borders in each(levels):
        torch.testing.assert_close(together[row], found(p.weight[row], own, borders), rtol=1e-6, atol=0)


@sides
@widths
def test_level_moments(bits, side):
    p, levels = problem(ROWS, COLUMNS, BLOCK, "lloyd", bits), levels_by_row(bits)
    codes = kernels.encode(p.weight, p.scale, None, levels, thresholds(levels), BLOCK)
    counts = torch.linspace(0.5, 2.0, COLUMNS)

    def moments(row: slice, by_row: bool) -> tuple[Tensor, Tensor]:
        weight, scale, code = p.weight[row], p.scale[row], codes[row]
        if side is reference:
            return reference.level_moments(weight, counts, scale, code, 2**bits, BLOCK, by_row)
        return kernels.level_moments(weight, scale, code, 2**bits, BLOCK, counts, by_row)

    together = moments(slice(None), True)
    for row, _, _ in each(levels):
        for got, expected in zip(together, moments(row, False), strict=True):
            torch.testing.assert_close(got[row][0], expected)


@sides
@widths
def test_feedback(bits, side):
    p, levels = problem(ROWS, COLUMNS, BLOCK, "lloyd", bits), levels_by_row(bits)

    def rounded(row: slice, own: Tensor, borders: Tensor) -> tuple[Tensor, Tensor]:
        work = p.weight[row][:, p.order].contiguous()
        codes, dense = torch.empty(work.shape, dtype=torch.uint8), torch.empty_like(work)
        constants = (p.inverse, p.order, p.scale[row], None, own, borders, BLOCK, (0, COLUMNS))
        side.feedback(work, *constants, codes, dense)
        return codes, dense

    codes, dense = rounded(slice(None), levels, thresholds(levels))
    for row, own, borders in each(levels):
        expected = rounded(row, own, borders)
        assert torch.equal(codes[row], expected[0])
        torch.testing.assert_close(dense[row], expected[1])


@sides
@widths
def test_descend(bits, side):
    p, levels = problem(ROWS, COLUMNS, BLOCK, "lloyd", bits), levels_by_row(bits)

    def descended(row: slice, own: Tensor, borders: Tensor) -> tuple[Tensor, Tensor]:
        scale = p.scale[row].clone()
        codes = kernels.encode(p.weight[row], scale, None, own, borders, BLOCK)
        dense = reference.dequantize(kernels.pack(codes, bits), scale, own, None, bits, BLOCK, COLUMNS)
        gradient = ((p.weight[row].double() - dense) @ p.hessian.double()).float().contiguous()
        side.descend(gradient, p.hessian, scale, None, own, borders, BLOCK, codes, dense, 1, True)
        return codes, dense

    codes, dense = descended(slice(None), levels, thresholds(levels))
    before = p.costs(
        reference.dequantize(
            kernels.pack(kernels.encode(p.weight, p.scale, None, levels, thresholds(levels), BLOCK), bits),
            p.scale,
            levels,
            None,
            bits,
            BLOCK,
            COLUMNS,
        )
    )
    assert (p.costs(dense) < before)[p.scale.ne(0).all(1)].all()
    for row, own, borders in each(levels):
        expected = descended(row, own, borders)
        assert torch.equal(codes[row], expected[0])
        torch.testing.assert_close(dense[row], expected[1], rtol=1e-4, atol=1e-5)


@widths
def test_descend_coupled(bits):
    """Rows depend on each other here: the compiled loop against the reference in float64."""
    p, levels = problem(ROWS, COLUMNS, BLOCK, "lloyd", bits), levels_by_row(bits)
    mixed = torch.randn(40, ROWS, generator=torch.Generator().manual_seed(5))
    coupling = mixed.T @ mixed / 40
    results = []
    for side, dtype in ((kernels, torch.float32), (reference, torch.float64)):
        scale, own = p.scale.to(dtype, copy=True), levels.to(dtype)
        codes = kernels.encode(p.weight, p.scale, None, levels, thresholds(levels), BLOCK)
        dense = reference.dequantize(kernels.pack(codes, bits), scale, own, None, bits, BLOCK, COLUMNS)
        error, hessian, rows = (t.to(dtype) for t in (p.weight - dense, p.hessian, coupling))
        side.descend_coupled(error, hessian, rows, scale, None, own, thresholds(own), BLOCK, codes, dense, True)
        results.append((codes, dense))
    same = (results[0][0] == results[1][0]).float().mean()
    assert same > 0.99, f"only {same:.3f} of the codes are the same"
    error = p.weight.double() - results[0][1].double()
    cost = float((coupling.double() @ error @ p.hessian.double() * error).sum())
    error = p.weight.double() - results[1][1]
    expected = float((coupling.double() @ error @ p.hessian.double() * error).sum())
    assert cost == pytest.approx(expected, rel=1e-2)
