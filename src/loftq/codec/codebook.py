"""The levels a code can stand for, sorted ascending, float32. Scaled so that the largest magnitude is 1, except the
affine ``uniform`` codebook, whose levels are the integers 0 ... 2^bits - 1.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from loftq.config import CODEBOOKS, one_of

# Quantile at which NormalFloat's outermost level sits. QLoRA's construction (Dettmers et al. 2023, section 3) averages
# 1 - 1/(2*15) and 1 - 1/(2*16), which rounds to this; bitsandbytes' tables, and so the published numbers, use it for
# every width.
_NF_OFFSET = 0.9677083


def _normal_quantile(p: np.ndarray) -> np.ndarray:
    from scipy.special import ndtri

    return ndtri(p)


def _normal_cdf(x: float) -> float:
    from scipy.special import ndtr

    return float(ndtr(x))


def normal_float(bits: int) -> np.ndarray:
    """NormalFloat as published: 2^(b-1) positive levels, 0, and 2^(b-1) - 1 negative levels.

    Positive levels are normal quantiles at probabilities evenly spaced from ``offset`` down to 1/2 (excluded), the
    negative ones likewise with one fewer; divided by the largest. NF2 = {-1, 0, 0.3379, 1}.
    Source: Dettmers et al. 2023 (arXiv 2305.14314), section 3; LoftQ (arXiv 2310.08659), appendix.
    """
    half = 2 ** (bits - 1)
    positive = _normal_quantile(np.linspace(_NF_OFFSET, 0.5, half + 1)[:-1])
    negative = -_normal_quantile(np.linspace(_NF_OFFSET, 0.5, half)[:-1])
    levels = np.sort(np.concatenate([positive, [0.0], negative]))
    return levels / levels.max()


def normal_float_symmetric(bits: int) -> np.ndarray:
    """Medians of 2^b equally probable intervals of a normal variable, divided by the largest: symmetric, no 0."""
    count = 2**bits
    levels = _normal_quantile((np.arange(count) + 0.5) / count)
    return levels / levels.max()


def uniform(bits: int) -> np.ndarray:
    """The integers 0 ... 2^b - 1, to be used with a zero point (affine, min/max). Source: LoftQ, section 2."""
    return np.arange(2**bits, dtype=np.float64)


def uniform_symmetric(bits: int) -> np.ndarray:
    """2^b evenly spaced levels from -1 to 1 (a half-integer zero point: 0 itself is no level)."""
    return np.linspace(-1.0, 1.0, 2**bits)


def lloyd_max(bits: int) -> np.ndarray:
    """Where fitting a codebook starts: the Lloyd-Max quantizer of a normal variable, moved off centre.

    Lloyd's algorithm (1982) on the normal distribution: each level the mean of its cell, cell borders halfway between
    levels. The whole is shifted by a fifth of the gap around 0, because a block may use the codebook mirrored (its
    scale may be negative): two mirror images that differ serve blocks better than one that is its own mirror image.
    """
    count = 2**bits
    if bits == 8:
        # With 256 levels a block is resolved up to its largest element, about 2.5 standard deviations for 64 elements.
        # Levels spaced by the cube root of the density (Panter and Dite 1951) are near-optimal there.
        inside = 0.5 + (_normal_cdf(2.5 / np.sqrt(3)) - 0.5) * np.linspace(-1, 1, count)
        levels = _normal_quantile(inside)
        return levels / np.abs(levels).max()
    # 2^16 equally probable points stand for the distribution; prefix sums give every cell's mean at once
    points = _normal_quantile((np.arange(1 << 16) + 0.5) / (1 << 16))
    sums = np.concatenate([[0.0], np.cumsum(points)])
    levels = points[(np.arange(count) * 2 + 1) * (len(points) // (2 * count))]
    for _ in range(500):
        edges = np.concatenate([[0], np.searchsorted(points, (levels[1:] + levels[:-1]) / 2), [len(points)]])
        levels = np.diff(sums[edges]) / np.maximum(np.diff(edges), 1)
    levels = levels + 0.2 * (levels[count // 2] - levels[count // 2 - 1])
    return levels / np.abs(levels).max()


_DERIVATIONS = {
    "nf": normal_float,
    "nf-sym": normal_float_symmetric,
    "uniform": uniform,
    "uniform-sym": uniform_symmetric,
    "lloyd": lloyd_max,
    "lloyd-channel": lloyd_max,
}
FITTED = ("lloyd", "lloyd-channel")


@cache
def _levels(name: str, bits: int) -> np.ndarray:
    return _DERIVATIONS[one_of("codebook", name, CODEBOOKS)](bits).astype(np.float32)


def codebook(name: str, bits: int, device: torch.device | str = "cpu") -> Tensor:
    """The (2^bits,) float32 levels of a named codebook; of a fitted codebook, those that fitting starts from."""
    return torch.from_numpy(_levels(name, bits).copy()).to(device)


def thresholds(levels: Tensor) -> Tensor:
    """Borders between the cells of neighbouring levels: (..., 2^bits - 1) midpoints."""
    return (levels[..., 1:] + levels[..., :-1]) * 0.5


@cache
def _dynamic_map() -> np.ndarray:
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = np.linspace(0.1, 1.0, 2**exponent + 1)
        fractions = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (exponent - 6)
        levels.extend(fractions)
        levels.extend(-fractions)
    return np.sort(np.array(levels)).astype(np.float32)


_maps: dict[torch.device, Tensor] = {}  # a GPU would wait for the copy in every product with 8-bit scales


def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """The (256,) signed 8-bit code for scales: for e = 0..6, 2^e fractions of 10^(e-6) between 0.1 and 1, both signs.

    Source: Dettmers 2016 (arXiv 1511.04561), "dynamic tree quantization", as QLoRA uses it for its second quantization.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return torch.from_numpy(_dynamic_map().copy())
    if device not in _maps:
        with torch.inference_mode(False):
            found = torch.from_numpy(_dynamic_map().copy()).to(device)
        if type(found) is not Tensor:  # one that only stands for a tensor, as under FakeTensorMode
            return found
        _maps[device] = found
    return _maps[device]
