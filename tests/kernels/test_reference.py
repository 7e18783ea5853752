"""Every compiled loop computes what :mod:`loftq.kernels.reference` defines, for any shape and number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from loftq import kernels
from loftq.codec.codebook import codebook, thresholds
from loftq.config import BITS
from loftq.kernels import reference

# (rows, in, block size): whole blocks, ragged ends of every kind, one element, and a matrix for several threads.
SHAPES = {
    "whole": (6, 256, 64),
    "ragged-8": (5, 200, 64),
    "ragged-odd": (7, 131, 32),
    "one-short-block": (3, 37, 128),
    "one-element": (1, 1, 64),
    "one-column": (9, 1, 32),
    "threaded": (300, 515, 256),
}
FACTORS = torch.tensor([0.3, 0.5, 0.7, 0.85, 1.0])


def wrong_preference(block_size: int) -> float:
    """Share of its energy that choosing another of two almost equal candidates can cost a block.

    A score is an explained energy num^2 / den in float32. Processors differ in the order in which they sum up a block, and
    the roundings of a sum's additions are a random walk: four sums are compared.
    """
    return 4 * block_size**0.5 * 2**-24


shapes = pytest.mark.parametrize(("rows", "n", "block_size"), SHAPES.values(), ids=SHAPES)
widths = pytest.mark.parametrize("bits", BITS, ids=lambda bits: f"{bits}bit")
zeros = pytest.mark.parametrize("with_zero", [False, True], ids=["scale", "scale+zero"])
counted = pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])


def random_weight(rows: int, n: int, seed: int = 0) -> Tensor:
    """Gaussian with an all-zero and a constant row where there are rows to spare."""
    weight = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))
    if rows > 2:
        weight[1] = 0
        weight[2] = 0.25
    return weight


def random_scales(rows: int, n: int, block_size: int, with_zero: bool) -> tuple[Tensor, Tensor | None]:
    """Scales of both signs, one of them 0, and zero points."""
    generator = torch.Generator().manual_seed(1)
    blocks = -(-n // block_size)
    scale = torch.randn(rows, blocks, generator=generator)
    scale[rows // 2, blocks // 2] = 0
    return scale, 4 * torch.randn(rows, blocks, generator=generator) if with_zero else None


def column_counts(n: int, weighted: bool) -> Tensor:
    """What each column counts: 1, or numbers of several magnitudes."""
    return torch.exp(2 * torch.randn(n, generator=torch.Generator().manual_seed(2))) if weighted else torch.ones(n)


def constant_blocks(weight: Tensor, block_size: int) -> Tensor:
    """(rows, blocks): every level but 0 represents them exactly, with its own scale."""
    padding = -weight.shape[1] % block_size
    blocks = torch.cat([weight, weight[:, -1:].expand(-1, padding)], 1).view(weight.shape[0], -1, block_size)
    return (blocks == blocks[..., -1:]).all(-1)


def levels_for(bits: int, with_zero: bool) -> Tensor:
    return codebook("uniform" if with_zero else "nf", bits)


def squared_error(
    weight: Tensor, counts: Tensor, scale: Tensor, zero: Tensor | None, levels: Tensor, block_size: int
) -> float:
    """Of the nearest levels under the given scales, in float64, each column's times what it counts."""
    codes = reference.encode(weight, scale, zero, levels, thresholds(levels), block_size).long()
    value = levels.double()[codes]
    if zero is not None:
        value = value + zero.double().repeat_interleave(block_size, 1)[:, : weight.shape[1]] * levels[1]
    value = value * scale.double().repeat_interleave(block_size, 1)[:, : weight.shape[1]]
    return float(((weight.double() - value).square() * counts.double()).sum())


def assert_same_choices(compiled: Tensor, defined: Tensor, ties: Tensor | None = None) -> None:
    """The same scale in all blocks but 1 % (one at least), where two candidates are equally good within rounding.

    ``ties`` are blocks where they certainly are, which don't count.
    """
    differs = ~torch.isclose(compiled, defined, rtol=1e-5, atol=0)
    different = int((differs if ties is None else differs & ~ties).sum())
    assert different <= max(1, compiled.numel() // 100), f"{different} of {compiled.numel()} scales differ"


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@shapes
@widths
def test_pack_and_unpack(bits, rows, n, block_size):
    codes = torch.randint(0, 2**bits, (rows, n), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = kernels.pack(codes, bits)
    assert torch.equal(packed, reference.pack(codes, bits))
    assert torch.equal(kernels.unpack(packed, bits, n), reference.unpack(packed, bits, n))


@zeros
@shapes
@widths
def test_dequantize(bits, rows, n, block_size, with_zero):
    codes = torch.randint(0, 2**bits, (rows, n), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scale, zero = random_scales(rows, n, block_size, with_zero)
    args = (kernels.pack(codes, bits), scale, levels_for(bits, with_zero), zero, bits, block_size, n)
    compiled, defined = kernels.dequantize(*args), reference.dequantize(*args)
    # the same operations in the same order, (level + zero) * scale; a compiler may contract them: 1 ulp of each of two
    tolerance = 2**-23 * (scale.abs().max() * (2**bits + 16 if with_zero else 1)).item()
    difference = (compiled - defined).abs().max().item()
    assert difference <= tolerance, f"largest difference {difference:.2e}"
    if not with_zero:
        assert torch.equal(compiled, defined)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64], ids=["float16", "bfloat16", "float64"]
)
@widths
def test_dequantize_to_another_dtype_rounds_the_float32_result(bits, dtype):
    codes = torch.randint(0, 2**bits, (5, 70), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scale, _ = random_scales(5, 70, 32, False)
    args = (kernels.pack(codes, bits), scale, codebook("nf", bits), None, bits, 32, 70)
    value = kernels.dequantize(*args, dtype)
    assert value.dtype == dtype
    assert torch.equal(value, kernels.dequantize(*args).to(dtype))


@zeros
@shapes
@widths
def test_encode(bits, rows, n, block_size, with_zero):
    weight, levels = random_weight(rows, n), levels_for(bits, with_zero)
    scale, zero = random_scales(rows, n, block_size, with_zero)
    args = (weight, scale, zero, levels, thresholds(levels), block_size)
    compiled, defined = kernels.encode(*args), reference.encode(*args)
    different = int((compiled != defined).sum())
    assert different == 0, f"{different} of {weight.numel()} codes differ"


@widths
def test_encode_ties_go_to_the_lower_level(bits):
    levels = codebook("uniform", bits)
    weight = thresholds(levels)[None, :].contiguous()
    args = (weight, torch.ones(1, -(-weight.shape[1] // 32)), None, levels, thresholds(levels), 32)
    expected = torch.arange(2**bits - 1, dtype=torch.uint8)[None, :]
    assert torch.equal(kernels.encode(*args), expected)
    assert torch.equal(reference.encode(*args), expected)


@pytest.mark.parametrize("name", ["nf", "nf-sym", "uniform-sym", "lloyd"])
@counted
@shapes
@widths
def test_search_scale(bits, rows, n, block_size, weighted, name):
    weight, counts, levels = random_weight(rows, n), column_counts(n, weighted), codebook(name, bits)
    mirrored = name in ("nf", "lloyd")  # in a symmetric codebook both signs tie
    factors = torch.cat([FACTORS, -FACTORS]) if mirrored else FACTORS
    args = (levels, thresholds(levels), factors, 1, block_size)
    compiled, defined = kernels.search_scale(weight, *args, counts), reference.search_scale(weight, counts, *args)
    compiled_error = squared_error(weight, counts, compiled, None, levels, block_size)
    defined_error = squared_error(weight, counts, defined, None, levels, block_size)
    tolerance = wrong_preference(block_size) * float((weight.double().square() * counts).sum())
    assert abs(compiled_error - defined_error) <= tolerance, (compiled_error, defined_error)
    assert_same_choices(compiled, defined, constant_blocks(weight, block_size))


@counted
@shapes
@widths
def test_search_affine(bits, rows, n, block_size, weighted):
    weight, counts, levels = random_weight(rows, n), column_counts(n, weighted), codebook("uniform", bits)
    args = (levels, thresholds(levels), FACTORS, 2, block_size)
    compiled, defined = kernels.search_affine(weight, *args, counts), reference.search_affine(weight, counts, *args)
    compiled_error = squared_error(weight, counts, *compiled, levels, block_size)
    defined_error = squared_error(weight, counts, *defined, levels, block_size)
    tolerance = wrong_preference(block_size) * float((weight.double().square() * counts).sum())
    assert abs(compiled_error - defined_error) <= tolerance, (compiled_error, defined_error)
    if bits < 8:  # there what any candidate leaves unexplained is no larger than the rounding of what it explains
        assert_same_choices(compiled[0], defined[0])


def tiny_weight(rows: int = 4, n: int = 100, block_size: int = 32) -> Tensor:
    """Blocks of denormal numbers, and of one number beside zeros, among Gaussian ones."""
    weight = random_weight(rows, n)
    weight[0, :block_size] *= 1e-39
    weight[-1, block_size:] = 0
    weight[-1, block_size] = 1e-42
    return weight


@widths
def test_search_scale_of_denormal_blocks(bits):
    """They keep the scale of their largest number: the reciprocal of another one might overflow."""
    weight, levels = tiny_weight(), codebook("nf", bits)
    args = (levels, thresholds(levels), torch.cat([FACTORS, -FACTORS]), 1, 32)
    for found in (kernels.search_scale(weight, *args), reference.search_scale(weight, torch.ones(100), *args)):
        assert bool(found.isfinite().all()), found
        assert torch.equal(found[0, 0], weight[0, :32].abs().max())
        assert torch.equal(found[-1, 1:], torch.tensor([weight[-1, 32], 0.0, 0.0]))


@widths
def test_search_affine_of_what_float32_cannot_tell_apart(bits):
    weight, levels = tiny_weight(), codebook("uniform", bits)
    weight[1] = 1.0
    weight[1, 3] = 1 - 2**-24
    args = (levels, thresholds(levels), FACTORS, 2, 32)
    for scale, zero in (
        kernels.search_affine(weight, *args),
        reference.search_affine(weight, torch.ones(100), *args),
    ):
        assert bool(scale.isfinite().all()), scale
        assert bool(zero.isfinite().all()), zero
        value = reference.dequantize(
            kernels.pack(kernels.encode(weight, scale, zero, *args[:2], 32), bits), scale, levels, zero, bits, 32, 100
        )
        assert float((value - weight)[1].abs().max()) <= 2**-22
        assert float((value - weight)[0, :32].abs().max()) <= 1e-38


def test_search_finds_the_scale_of_a_representable_block():
    levels = codebook("nf", 4)
    scale = torch.tensor([[0.37, -2.5]])
    codes = torch.arange(16, dtype=torch.uint8).repeat(1, 8)
    weight = reference.dequantize(kernels.pack(codes, 4), scale, levels, None, 4, 64, 128)
    factors = torch.cat([FACTORS, -FACTORS])
    found = kernels.search_scale(weight, levels, thresholds(levels), factors, 1, 64)
    torch.testing.assert_close(found, scale, rtol=1e-6, atol=0)


@counted
@shapes
@widths
def test_level_moments(bits, rows, n, block_size, weighted):
    weight, counts, levels = random_weight(rows, n), column_counts(n, weighted), codebook("nf", bits)
    scale, _ = random_scales(rows, n, block_size, False)
    codes = reference.encode(weight, scale, None, levels, thresholds(levels), block_size)
    args = (scale, codes, 2**bits, block_size)
    num, den = kernels.level_moments(weight, *args, counts)
    num_defined, den_defined = reference.level_moments(weight, counts, *args)
    assert num.dtype == den.dtype == torch.float64
    # float64 sums of up to 1.5e5 products in another order; a sum of both signs is measured by its summands' sizes
    size = kernels.level_moments(weight.abs(), scale.abs(), *args[1:], counts)[0]
    num_difference = float(((num - num_defined).abs() / size.clamp_min(1e-300)).max())
    den_difference = float(((den - den_defined).abs() / den_defined.clamp_min(1e-300)).max())
    assert num_difference <= 1e-12, f"{num_difference:.2e}"
    assert den_difference <= 1e-12, f"{den_difference:.2e}"


@shapes
@widths
def test_counts_of_one_are_no_counts(bits, rows, n, block_size):
    weight, levels, affine = random_weight(rows, n), codebook("nf", bits), codebook("uniform", bits)
    scale, _ = random_scales(rows, n, block_size, False)
    codes = reference.encode(weight, scale, None, levels, thresholds(levels), block_size)
    ones = torch.ones(n)
    args = (weight, levels, thresholds(levels), FACTORS, 1, block_size)
    assert torch.equal(kernels.search_scale(*args), kernels.search_scale(*args, ones))
    args = (weight, affine, thresholds(affine), FACTORS, 2, block_size)
    for without, with_ones in zip(kernels.search_affine(*args), kernels.search_affine(*args, ones), strict=True):
        assert torch.equal(without, with_ones)
    args = (weight, scale, codes, 2**bits, block_size)
    for without, with_ones in zip(kernels.level_moments(*args), kernels.level_moments(*args, ones), strict=True):
        assert torch.equal(without, with_ones)


@pytest.mark.parametrize("kernel", ["pack", "unpack", "dequantize", "encode", "scale", "affine", "moments"])
@widths
def test_result_does_not_depend_on_the_number_of_threads(bits, kernel):
    rows, n, block_size = 515, 260, 64  # several threads' worth of elements, rows that do not divide
    weight, levels = random_weight(rows, n), codebook("nf", bits)
    affine = codebook("uniform", bits)
    scale, _ = random_scales(rows, n, block_size, False)
    codes = reference.encode(weight, scale, None, levels, thresholds(levels), block_size)
    packed = reference.pack(codes, bits)
    calls = {
        "pack": lambda: [kernels.pack(codes, bits)],
        "unpack": lambda: [kernels.unpack(packed, bits, n)],
        "dequantize": lambda: [kernels.dequantize(packed, scale, levels, None, bits, block_size, n)],
        "encode": lambda: [kernels.encode(weight, scale, None, levels, thresholds(levels), block_size)],
        "scale": lambda: [kernels.search_scale(weight, levels, thresholds(levels), FACTORS, 1, block_size)],
        "affine": lambda: kernels.search_affine(weight, affine, thresholds(affine), FACTORS, 2, block_size),
        "moments": lambda: kernels.level_moments(weight, scale, codes, 2**bits, block_size),
    }
    results = []
    for count in (1, 2, 3):
        with torch_threads(count):
            results.append(calls[kernel]())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
