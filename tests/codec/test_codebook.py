"""Named codebooks against published tables and against their definitions."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

import transcription
from loftq.codec.codebook import codebook, dynamic_map, thresholds
from loftq.config import BITS, CODEBOOKS
from loftq.errors import ConfigError

NF2 = [-1, 0, 0.3379, 1]
NF4 = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0]
NF4 += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1]

# Max (1960), "Quantizing for minimum distortion", table I: positive levels of the best quantizer of a unit normal.
MAX_1960 = {
    2: [0.4528, 1.510],
    3: [0.2451, 0.7560, 1.344, 2.152],
    4: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
}

FLOAT32_ULP = 2.0**-23  # spacing of float32 at 1, the largest level


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", CODEBOOKS)
def test_is_sorted_float32_with_one_level_a_code(name, bits):
    levels = codebook(name, bits)
    assert levels.dtype == torch.float32
    assert levels.shape == (2**bits,)
    gaps = levels.diff()
    assert bool((gaps > 0).all()), f"smallest gap {gaps.min():.3g}"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", [n for n in CODEBOOKS if n != "uniform"])
def test_largest_magnitude_is_one(name, bits):
    assert float(codebook(name, bits).abs().max()) == 1.0


@pytest.mark.parametrize(("bits", "published"), [(2, NF2), (4, NF4)], ids=["nf2", "nf4"])
def test_nf_equals_the_published_values(bits, published):
    # published with four decimals: half a unit of the last, and float32 rounding
    difference = np.abs(codebook("nf", bits).numpy() - np.array(published)).max()
    assert difference <= 0.5e-4 + FLOAT32_ULP, f"largest difference {difference:.2e}"


def test_nf4_equals_bitsandbytes(bnb):
    # bitsandbytes ships decimals of a float32 computation: a few ulp from float64 rounded once
    difference = (codebook("nf", 4) - bnb.get_4bit_type("nf4", device="cpu")).abs().max().item()
    assert difference <= 2 * FLOAT32_ULP, f"largest difference {difference:.2e}"


@pytest.mark.parametrize("bits", BITS)
def test_nf_equals_the_construction(bits):
    # both in float64 with different quantile functions; the project rounds to float32 once
    difference = np.abs(codebook("nf", bits).numpy() - transcription.normal_float(bits)).max()
    assert difference <= FLOAT32_ULP / 2, f"largest difference {difference:.2e}"


@pytest.mark.parametrize("bits", BITS)
def test_nf_has_an_exact_zero_and_one_more_positive_level(bits):
    levels = codebook("nf", bits)
    assert levels[2 ** (bits - 1) - 1] == 0.0
    assert int((levels > 0).sum()) == 2 ** (bits - 1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["nf-sym", "uniform-sym"])
def test_symmetric_codebooks_mirror_themselves(name, bits):
    levels = codebook(name, bits)
    difference = (levels + levels.flip(0)).abs().max().item()
    assert difference <= FLOAT32_ULP, f"largest asymmetry {difference:.2e}"


@pytest.mark.parametrize("bits", BITS)
def test_nf_sym_levels_are_medians_of_equally_probable_cells(bits):
    count = 2**bits
    quantiles = [NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]
    difference = np.abs(codebook("nf-sym", bits).numpy() - np.array(quantiles) / max(quantiles)).max()
    assert difference <= FLOAT32_ULP, f"largest difference {difference:.2e}"


@pytest.mark.parametrize("bits", BITS)
def test_uniform_is_the_integers(bits):
    assert torch.equal(codebook("uniform", bits), torch.arange(2.0**bits))


@pytest.mark.parametrize("bits", BITS)
def test_uniform_sym_is_evenly_spaced(bits):
    gaps = codebook("uniform-sym", bits).diff()
    step = 2 / (2**bits - 1)
    difference = (gaps - step).abs().max().item()
    assert difference <= FLOAT32_ULP, f"step {step:.6f}, largest difference {difference:.2e}"


def unshifted_lloyd(bits: int) -> np.ndarray:
    """The ``lloyd`` codebook moved back to the centre, up to a factor: it is symmetric before its documented shift."""
    levels = codebook("lloyd", bits).double().numpy()
    return levels - (levels[0] + levels[-1]) / 2


@pytest.mark.parametrize("bits", sorted(MAX_1960))
def test_lloyd_equals_the_known_quantizer_of_a_normal_variable(bits):
    positive = np.array(MAX_1960[bits])
    known = np.concatenate([-positive[::-1], positive]) / positive[-1]
    centred = unshifted_lloyd(bits)
    difference = np.abs(centred / centred[-1] - known).max()
    # the table has four digits; 2^16 equally probable points stand for the distribution and cut its tail, which moves
    # the outermost of 16 levels, to which all are normalised, by 3e-4 of itself
    assert difference <= 1e-3, f"largest difference {difference:.2e}"


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lloyd_levels_are_the_means_of_their_cells(bits):
    positive = np.array(MAX_1960[bits])
    centred = unshifted_lloyd(bits)
    levels = centred * positive[-1] / centred[-1]  # in units of the normal variable's deviation
    normal = NormalDist()
    borders = [-math.inf, *((levels[1:] + levels[:-1]) / 2), math.inf]
    mass = np.diff([normal.cdf(b) for b in borders])
    density = [normal.pdf(b) if math.isfinite(b) else 0.0 for b in borders]
    means = -np.diff(density) / mass
    difference = np.abs(means - levels).max()
    assert difference <= 2e-3, f"largest distance of a level from its cell's mean {difference:.2e}"


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lloyd_is_shifted_by_a_fifth_of_the_central_gap(bits):
    levels = codebook("lloyd", bits).double()
    shift = float(levels[0] + levels[-1]) / 2
    gap = float(levels[2 ** (bits - 1)] - levels[2 ** (bits - 1) - 1])
    # gap and shift are differences of float32 numbers of size 1
    assert shift / gap == pytest.approx(0.2, abs=4 * FLOAT32_ULP / gap)


def test_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"codebook is 'uniformsym'.*did you mean uniform-sym\?"):
        codebook("uniformsym", 4)


def test_result_is_a_copy():
    codebook("nf", 2).zero_()
    assert float(codebook("nf", 2)[0]) == -1.0


def test_thresholds_are_midpoints():
    assert torch.equal(thresholds(torch.tensor([-1.0, 0.0, 0.5, 2.0])), torch.tensor([-0.5, 0.25, 1.25]))


def test_dynamic_map_equals_bitsandbytes(bnb):
    theirs, ours = bnb.create_dynamic_map(), dynamic_map()
    assert ours.shape == theirs.shape == (256,)
    difference = (ours - theirs).abs().max().item()
    # theirs is computed in float32
    assert difference <= FLOAT32_ULP, f"largest difference {difference:.2e}"


def test_dynamic_map_is_sorted_and_holds_zero_and_one():
    levels = dynamic_map()
    assert levels.dtype == torch.float32
    assert bool((levels.diff() > 0).all())
    assert {0.0, 1.0} <= set(levels.tolist())
