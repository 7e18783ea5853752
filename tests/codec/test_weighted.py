"""Quantizing with what the squared error of each input feature counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loftq.codec import quantize
from loftq.config import BITS, CODEBOOKS, SCALES, QuantSpec

every_codebook = pytest.mark.parametrize("codebook", CODEBOOKS)
widths = pytest.mark.parametrize("bits", BITS, ids=lambda bits: f"{bits}bit")
# 256 levels a row in bfloat16 are coarser than the blocks' own rounding
finer = [(bits, codebook) for bits in BITS for codebook in CODEBOOKS if (bits, codebook) != (8, "lloyd-channel")]
every_finer_codebook = pytest.mark.parametrize(("bits", "codebook"), finer, ids=[f"{b}bit-{c}" for b, c in finer])


def gaussian(rows: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))


def counts_for(n: int) -> Tensor:
    return torch.exp(1.5 * gaussian(1, n, 7)[0])


def weighted_error(weight: Tensor, counts: Tensor, spec: QuantSpec, importance: Tensor | None) -> float:
    error = weight.double() - quantize(weight, spec, importance=importance).dequantize().double()
    return float((error.square() * counts.double()).sum())


@every_codebook
@pytest.mark.parametrize("scale", SCALES)
@widths
def test_counts_of_one_change_nothing(bits, scale, codebook):
    weight, spec = gaussian(9, 150), QuantSpec(bits, codebook, scale=scale)
    plain, counted = quantize(weight, spec), quantize(weight, spec, importance=torch.ones(150))
    assert all(torch.equal(t, counted.tensors[n]) for n, t in plain.tensors.items())


@every_finer_codebook
def test_common_factor_of_the_counts_changes_little(bits, codebook):
    weight, counts, spec = gaussian(9, 150), counts_for(150), QuantSpec(bits, codebook)
    errors = [weighted_error(weight, counts, spec, counts * factor) for factor in (1.0, 1e-6, 1e6)]
    # sums are rounded otherwise, and a block may prefer another of two equally good scales; at 8 bits they nearly all are
    assert errors == pytest.approx([errors[0]] * 3, rel=0.05 if bits == 8 else 0.01)
    exact = [quantize(weight, spec, importance=counts * factor).codes() for factor in (1.0, 4.0)]
    assert torch.equal(*exact)


@every_codebook
@pytest.mark.parametrize("bits", [2, 3, 4], ids=lambda bits: f"{bits}bit")
def test_counted_columns_err_less(bits, codebook):
    weight, counts, spec = gaussian(64, 256), counts_for(256), QuantSpec(bits, codebook, scale_dtype="float32")
    counted, plain = (weighted_error(weight, counts, spec, importance) for importance in (counts, None))
    assert counted < 0.97 * plain, f"{counted / plain:.4f} of the error without counts"
    # at the others' cost
    ones = torch.ones(256)
    assert weighted_error(weight, ones, spec, counts) > weighted_error(weight, ones, spec, None)


@every_finer_codebook
def test_single_counted_column_is_nearly_exact(bits, codebook):
    # all but one column of a block count next to nothing: its scale serves that one
    weight, counts = gaussian(20, 64), torch.full((64,), 1e-6)
    counts[5] = 1
    spec = QuantSpec(bits, codebook, scale_dtype="float32")
    error = (weight - quantize(weight, spec, importance=counts).dequantize())[:, 5].abs()
    plain = (weight - quantize(weight, spec).dequantize())[:, 5].abs()
    assert float(error.mean()) < 0.25 * float(plain.mean()), (
        f"{float(error.mean()):.1e} against {float(plain.mean()):.1e}"
    )


@every_codebook
@widths
def test_columns_that_count_nothing_leave_values_finite(bits, codebook):
    weight, counts = gaussian(10, 150), torch.ones(150)
    counts[64:128] = 0  # a whole block
    value = quantize(weight, QuantSpec(bits, codebook), importance=counts).dequantize()
    assert bool(value.isfinite().all()), f"{int((~value.isfinite()).sum())} values are not finite"


def test_counts_of_another_width_are_refused():
    from loftq.errors import LoftQError

    for wrong in (torch.ones(149), torch.ones(10, 150), torch.ones(1)):
        with pytest.raises(LoftQError):
            quantize(gaussian(10, 150), QuantSpec(), importance=wrong)
