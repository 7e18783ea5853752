"""Error feedback and coordinate descent: the compiled loops against their definition, which is run in float64."""

from __future__ import annotations

import pytest
import torch
from rounding_problems import descended, in_double, problem, start

from loftq import kernels
from loftq.codec.codebook import thresholds
from loftq.config import BITS, CODEBOOKS
from loftq.kernels import reference

# (rows, in, block size): a ragged last block, one short block, one element, whole blocks for several threads
SHAPES = {
    "ragged": (7, 131, 64),
    "one-short-block": (4, 37, 128),
    "one-element": (1, 1, 64),
    "threaded": (60, 128, 32),
}

shapes = pytest.mark.parametrize(("rows", "n", "block_size"), SHAPES.values(), ids=SHAPES)
widths = pytest.mark.parametrize("bits", BITS, ids=lambda bits: f"{bits}bit")
codebooks = pytest.mark.parametrize("name", CODEBOOKS)


@codebooks
@shapes
@widths
def test_feedback_equals_its_definition(bits, rows, n, block_size, name):
    p = problem(rows, n, block_size, name, bits)
    constants = (p.inverse, p.order, p.scale, p.zero, p.levels, thresholds(p.levels))
    results = []
    for function, convert in ((kernels.feedback, tuple), (reference.feedback, in_double)):
        (work,) = convert((p.weight[:, p.order].contiguous(),))
        codes = torch.full((rows, n), 255, dtype=torch.uint8)
        dense = torch.full_like(work, torch.nan)
        errors = []
        for begin in range(0, n, block_size):
            end = min(begin + block_size, n)
            part = function(work, *convert(constants), block_size, (begin, end), codes, dense)
            work[:, end:] -= part @ p.inverse[begin:end, end:].to(work)
            errors.append(part)
        results.append((codes, dense, work, torch.cat(errors, 1)))
    (codes, dense, work, errors), (codes64, dense64, work64, errors64) = results

    # float32 accumulates up to n roundings of errors passed on, each of a number no larger than the largest of them
    tolerance = 2**-24 * (n**0.5) * 8 * float(work64.abs().max())
    differs = (codes != codes64)[:, p.order]
    position = torch.arange(n).expand(rows, n)
    first = torch.where(differs, position, n).amin(1)  # (rows,) where the roundings part
    before = position < first[:, None]
    assert float(((work - work64).abs() * (position <= first[:, None])).max()) <= tolerance
    assert float(((dense - dense64).abs()[:, p.order] * before).max()) <= tolerance
    relative = (errors - errors64).abs() / p.inverse.diagonal().reciprocal()
    assert float((relative * before).max()) <= 2 * tolerance
    parted = (first < n).nonzero().flatten()
    for r in parted:
        i = int(p.order[first[r]])
        s, x = float(p.scale[r, i // block_size]), float(work64[r, first[r]])
        offset = 0.0 if p.zero is None else float(p.zero[r, i // block_size] * p.levels[1])
        borders = s * (thresholds(p.levels).double() + offset)
        distance = float((borders - x).abs().min())
        assert distance <= tolerance, f"row {r} parts at column {i}, {distance:.1e} from a tie"
    assert len(parted) <= max(1, rows // 10), f"{len(parted)} of {rows} rows met a tie"
    # whatever was rounded how: the objective is the sum of the squared errors
    torch.testing.assert_close(p.costs(dense), errors.double().square().sum(1), rtol=1e-4, atol=1e-4)


@codebooks
@shapes
@widths
def test_feedback_leaves_values_of_its_codes(bits, rows, n, block_size, name):
    p = problem(rows, n, block_size, name, bits)
    codes, dense = torch.empty(rows, n, dtype=torch.uint8), torch.empty(rows, n)
    work = p.weight[:, p.order].contiguous()
    constants = (p.inverse, p.order, p.scale, p.zero, p.levels, thresholds(p.levels))
    kernels.feedback(work, *constants, block_size, (0, n), codes, dense)
    difference = (dense - p.value(codes, p.scale, block_size)).abs().max().item()
    size = float(p.scale.abs().max()) * (2**bits + 4 if p.zero is not None else 1)
    assert difference <= 2**-22 * size, f"{difference:.1e}"
    middle = int(p.levels.abs().argmin())
    without = (p.scale == 0).repeat_interleave(block_size, 1)[:, :n]
    assert bool((codes[without] == middle).all())
    assert bool((dense[without] == 0).all())


@codebooks
@widths
def test_feedback_of_the_identity_is_encode(bits, name):
    p = problem(9, 100, 32, name, bits)
    codes, dense = torch.empty(9, 100, dtype=torch.uint8), torch.empty(9, 100)
    borders = thresholds(p.levels)
    constants = (torch.eye(100), p.order, p.scale, p.zero, p.levels, borders)
    kernels.feedback(p.weight[:, p.order].contiguous(), *constants, 32, (0, 100), codes, dense)
    assert torch.equal(codes, kernels.encode(p.weight, p.scale, p.zero, p.levels, borders, 32))


@codebooks
@shapes
@widths
@pytest.mark.parametrize("refit", [False, True], ids=["codes", "codes+scales"])
def test_descend_equals_its_definition(refit, bits, rows, n, block_size, name):
    p = problem(rows, n, block_size, name, bits)
    found, defined = (descended(p, block_size, 2, refit, double) for double in (False, True))
    same = (found.codes == defined.codes).all(1)
    # ties, and at 8 bits steps that are small beside what float32 leaves of the gradient
    few = rows // 2 if bits == 8 else rows // 10
    assert int((~same).sum()) <= max(1, few), f"{int((~same).sum())} of {rows} rows differ"
    torch.testing.assert_close(found.scale[same].double(), defined.scale[same], rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(found.dense[same].double(), defined.dense[same], rtol=2e-5, atol=2e-5)
    ours, theirs = (float(p.costs(state.dense).sum()) for state in (found, defined))
    assert ours == pytest.approx(theirs, rel=1e-5 if bool(same.all()) else 1e-2)


@codebooks
@widths
@pytest.mark.parametrize("refit", [False, True], ids=["codes", "codes+scales"])
def test_descend_keeps_its_state_consistent(refit, bits, name):
    rows, n, block_size = SHAPES["ragged"]
    p = problem(rows, n, block_size, name, bits)
    state = descended(p, block_size, 3, refit)
    size = float(p.weight.abs().max()) + float(state.dense.abs().max())
    values = p.value(state.codes, state.scale, block_size)
    assert float((state.dense - values).abs().max()) <= 2**-20 * size * (2**bits if p.zero is not None else 1)
    gradient = (p.weight.double() - values) @ p.hessian.double()
    assert float((state.gradient - gradient).abs().max()) <= 2**-24 * 64 * n**0.5 * size
    assert torch.equal(state.scale == 0, p.scale == 0)
    if not refit:
        assert torch.equal(state.scale, p.scale)
    before, after = p.costs(start(p, block_size).dense), p.costs(state.dense)
    assert bool((after <= before * (1 + 1e-5) + 1e-9).all()), "a row's objective rose"


@codebooks
@widths
def test_descend_does_nothing_for_the_identity(bits, name):
    p = problem(9, 100, 32, name, bits)._replace(hessian=torch.eye(100))
    before, after = start(p, 32), descended(p, 32, 2, False)
    assert torch.equal(before.codes, after.codes)


@pytest.mark.parametrize("kernel", ["feedback", "descend"])
def test_result_does_not_depend_on_the_number_of_threads(kernel):
    rows, n = 300, 200
    p = problem(rows, n, 64, "uniform", 3)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            if kernel == "descend":
                start_state = start(p, 64)
                gradient = (p.weight - start_state.dense).double() @ p.hessian.double()  # torch's sum may depend on it
                args = (p.zero, p.levels, thresholds(p.levels), 64, start_state.codes, start_state.dense, 2, True)
                kernels.descend(gradient.float(), p.hessian, start_state.scale, *args)
                results.append((start_state.codes, start_state.scale, start_state.dense))
            else:
                codes, dense = torch.empty(rows, n, dtype=torch.uint8), torch.empty(rows, n)
                work = p.weight[:, p.order].contiguous()
                constants = (p.inverse, p.order, p.scale, p.zero, p.levels, thresholds(p.levels))
                results.append((kernels.feedback(work, *constants, 64, (0, n), codes, dense), codes, dense, work))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
