"""Dense matrix -> :class:`QuantizedTensor`: choosing scales, codes and, where the codebook is fitted, levels.

Every step after the first minimises the same squared error over one of its arguments and keeps the others: codes given
scales (nearest level), scale given codes (least squares), levels given codes and scales (least squares, Lloyd 1982).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from loftq import kernels
from loftq.codec import codebook as codebooks
from loftq.codec.packing import pack
from loftq.codec.qtensor import QuantizedTensor, storage_layout
from loftq.codec.scales import DTYPES, double_dequantize, double_quantize
from loftq.config import QuantSpec
from loftq.errors import WeightError

# Shrink factors of the absmax scale that the search tries, (lowest, count); the highest is 1. The fewer the bits, the
# further the best clipping point lies below the largest element.
_FACTORS = {2: (0.30, 8), 3: (0.50, 8), 4: (0.65, 8), 8: (0.92, 3)}

# Largest magnitudes outside this range are first scaled by a power of two, so that scales fit float16 and squares
# float32; the power goes into the codebook.
_COMFORTABLE = (2.0**-6, 2.0**12)


_CHECKED = 1 << 22  # elements looked at together in all_finite


def all_finite(tensor: Tensor) -> bool:
    """Whether float32 holds every element as a finite number.

    A few rows at a time: ``isfinite`` of the whole takes several times its memory, which would be the peak of a run.
    """
    rows = max(1, _CHECKED * tensor.shape[0] // max(1, tensor.numel())) if tensor.dim() else 1
    parts = tensor.split(rows) if tensor.dim() and tensor.numel() else (tensor,)
    # NaN passes through both extremes
    return all(bool(torch.isfinite(torch.stack(part.float().aminmax())).all()) for part in parts if part.numel())


def check_weight(weight: Tensor) -> None:
    """Refuse what cannot be quantized.

    Raises:
        WeightError: not a floating (out, in) matrix, empty, or with NaN or infinite elements.
    """
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        got = f"{weight.dtype} of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise WeightError(f"weight is {got}, expected a floating-point matrix (out_features, in_features)")
    if weight.numel() == 0:
        raise WeightError(f"weight has shape {tuple(weight.shape)}, expected at least one element")
    if not all_finite(weight):
        nan = int(weight.isnan().sum())
        # a float64 weight may be too large for float32
        infinite = int((~torch.isfinite(weight.float())).sum()) - nan
        raise WeightError(
            f"weight of shape {tuple(weight.shape)} has {nan} NaN and {infinite} infinite elements, expected finite "
            f"numbers; check the source checkpoint"
        )


def comfortable_gain(weight: Tensor) -> float:
    """A power of two to divide a matrix by before computing with it in float32; 1 for ordinary magnitudes."""
    low, high = weight.aminmax()
    largest = max(-float(low), float(high))
    if largest == 0 or _COMFORTABLE[0] <= largest <= _COMFORTABLE[1]:
        return 1.0
    return 2.0 ** (math.frexp(largest)[1] - 1)


def divided(weight: Tensor, gain: float) -> Tensor:
    """``weight / gain`` in float32, through float64 because a gain may lie beyond float32's normal numbers."""
    return weight if gain == 1.0 else (weight.double() / gain).float()


def _block_extreme(weight: Tensor, block_size: int, reduce: str) -> Tensor:
    """(rows, blocks) ``amin`` or ``amax`` of each block; the last block of a row may be shorter."""
    rows, n = weight.shape
    whole = n - n % block_size
    parts = []
    if whole:
        parts.append(getattr(weight[:, :whole].reshape(rows, -1, block_size), reduce)(-1))
    if whole < n:
        parts.append(getattr(weight[:, whole:], reduce)(-1, keepdim=True))
    return torch.cat(parts, 1)


def block_absmax(weight: Tensor, block_size: int) -> Tensor:
    """(rows, blocks) largest magnitude of each block."""
    return torch.maximum(_block_extreme(weight, block_size, "amax"), -_block_extreme(weight, block_size, "amin"))


def _search_factors(spec: QuantSpec, device: torch.device) -> Tensor:
    lowest, count = _FACTORS[spec.bits]
    factors = torch.linspace(lowest, 1.0, count, dtype=torch.float32, device="cpu")
    # A negative scale mirrors the codebook: a free choice per block where the codebook is not its own mirror image.
    # Not with double quantization, which codes scales around their mean and needs them close together.
    if spec.codebook in ("nf", *codebooks.FITTED) and not spec.double_quant:
        factors = torch.cat([factors, -factors])
    return factors.to(device)


def fit_scales(
    weight: Tensor, spec: QuantSpec, levels: Tensor, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """float32 (scale, zero) of every block for the given levels, before they are stored.

    ``importance`` (in,): what the squared error of each input feature counts, for a searched scale.
    """
    factors = _search_factors(spec, weight.device)
    borders = codebooks.thresholds(levels)
    if spec.codebook == "uniform":
        if spec.scale == "search":
            found = kernels.search_affine(weight, levels, borders, factors, 2, spec.block_size, importance)
            return _limit_zero(*found, spec.scale_dtype)
        low = _block_extreme(weight, spec.block_size, "amin")
        high = _block_extreme(weight, spec.block_size, "amax")
        scale = (high - low) / levels[-1]
        constant = scale == 0
        scale, zero = torch.where(constant, low.abs(), scale), torch.where(constant, low.sign(), low / scale)
        return _limit_zero(scale, zero, spec.scale_dtype)
    if spec.scale == "absmax":
        return block_absmax(weight, spec.block_size) / levels.abs().amax(-1, keepdim=True), None
    return kernels.search_scale(weight, levels, borders, factors, 1, spec.block_size, importance), None


def _limit_zero(scale: Tensor, zero: Tensor, scale_dtype: str) -> tuple[Tensor, Tensor]:
    """Widen the step of blocks that are nearly constant, whose zero point would not fit its dtype.

    Their steps become as fine as the dtype resolves their offset, scale * zero, which is kept.
    """
    limit = {"float32": 2.0**20, "float16": 2.0**10, "bfloat16": 2.0**7}[scale_dtype]
    offset = scale * zero
    beyond = zero.abs() > limit
    return torch.where(beyond, offset.abs() / limit, scale), torch.where(beyond, zero.sign() * limit, zero)


def levels_given(
    weight: Tensor, scale: Tensor, codes: Tensor, levels: Tensor, block_size: int, importance: Tensor | None
) -> Tensor:
    """Least squares of each level given codes and scales; a level without elements stays."""
    by_row = levels.dim() == 2
    num, den = kernels.level_moments(weight, scale, codes, levels.shape[-1], block_size, importance, by_row)
    fitted = torch.where(den > 0, num / den.clamp_min(1e-300), levels.double()).float()
    ordered = (fitted[..., 1:] >= fitted[..., :-1]).all(-1, keepdim=True)
    return torch.where(ordered, fitted, levels)


def normalised(levels: Tensor) -> Tensor:
    """Levels divided by the largest magnitude among them; each row by its own."""
    largest = levels.abs().amax(-1, keepdim=True)
    return levels / torch.where(largest > 0, largest, 1.0)


def rounded_levels(levels: Tensor, spec: QuantSpec) -> Tensor:
    """Levels as they are stored."""
    return levels.bfloat16().float() if spec.codebook == "lloyd-channel" else levels


def starting_levels(
    weight: Tensor, spec: QuantSpec, levels: Tensor | None = None, importance: Tensor | None = None
) -> Tensor:
    """The levels to quantize a matrix with, (2^bits,), or (out, 2^bits) for ``lloyd-channel``.

    Those of a fitted codebook are fitted to the matrix, or row, unless some are given to start from. Fitting alternates
    scales, codes and levels; the result has a largest magnitude of 1.
    """
    if spec.codebook not in codebooks.FITTED:
        return codebooks.codebook(spec.codebook, spec.bits, weight.device)
    if levels is not None:
        return normalised(levels.to(weight.device))
    levels = codebooks.codebook(spec.codebook, spec.bits, weight.device)
    if spec.codebook == "lloyd-channel":
        levels = levels.expand(weight.shape[0], -1).contiguous()
    for _ in range(2):
        scale, _ = fit_scales(weight, spec, levels, importance)
        codes = kernels.encode(weight, scale, None, levels, codebooks.thresholds(levels), spec.block_size)
        levels = normalised(levels_given(weight, scale, codes, levels, spec.block_size, importance))
    return levels


class StoredScales(NamedTuple):
    """Scales (and zeros) as they are stored: the tensors, and the float32 (out, blocks) numbers they stand for."""

    tensors: dict[str, Tensor]
    scale: Tensor
    zero: Tensor | None


def store_scales(scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> StoredScales:
    """Round scales and zeros to what the spec stores."""
    tensors: dict[str, Tensor] = {}
    if spec.double_quant:
        packed_scale = double_quantize(scale)
        tensors["weight_scale"], tensors["weight_scale_absmax"], tensors["weight_scale_offset"] = packed_scale
        stored = double_dequantize(*packed_scale)
    else:
        tensors["weight_scale"] = scale.to(DTYPES[spec.scale_dtype])
        stored = tensors["weight_scale"].float()
    if zero is not None:
        # the offset scale * zero is what matters, and the scale has just been rounded
        zero = torch.where(stored == 0, zero, scale * zero / stored)
        tensors["weight_zero"] = zero.to(DTYPES[spec.scale_dtype])
        zero = tensors["weight_zero"].float()
    return StoredScales(tensors, stored, zero)


def assemble(codes: Tensor, stored: StoredScales, levels: Tensor, spec: QuantSpec) -> QuantizedTensor:
    """The :class:`QuantizedTensor` of (out, in) codes under stored scales and levels."""
    shape = (codes.shape[0], codes.shape[1])
    layout = storage_layout(spec, shape)
    packed = pack(codes, spec.bits).view(layout["weight"].shape)
    codebook = levels.to(layout["weight_codebook"].dtype)
    return QuantizedTensor({**stored.tensors, "weight": packed, "weight_codebook": codebook}, spec, shape)


def quantize(
    weight: Tensor, spec: QuantSpec, *, levels: Tensor | None = None, importance: Tensor | None = None
) -> QuantizedTensor:
    """Quantize a matrix: codes are the nearest levels under the scales as they are stored.

    Args:
        weight: (out, in), any floating dtype, any device; computed in float32.
        spec: how to store it.
        levels: where fitting a codebook starts (an earlier result for a similar matrix); ignored otherwise.
        importance: (in,) what the squared error of each input feature counts where scales and levels are fitted.

    Raises:
        WeightError: see :func:`check_weight`.
    """
    check_weight(weight)
    if importance is not None:
        shape, expected = tuple(importance.shape), (weight.shape[1],)
        if shape != expected or not torch.isfinite(importance).all() or bool((importance < 0).any()):
            raise WeightError(
                f"importance has shape {shape} or NaN, infinite or negative elements, expected finite numbers of shape "
                f"{expected}; calibrate again"
            )
        # a block whose columns all count nothing would have no scale
        importance = importance.clamp_min(1e-6 * float(importance.mean()) or 1.0)
    return quantize_checked(weight.detach().float().contiguous(), spec, levels, importance)


def quantize_checked(
    weight: Tensor, spec: QuantSpec, levels: Tensor | None, importance: Tensor | None = None
) -> QuantizedTensor:
    """:func:`quantize` for a contiguous float32 matrix that is known to be finite."""
    gain = comfortable_gain(weight)
    if gain != 1.0 and spec.codebook == "uniform":
        gain /= 2**spec.bits  # its levels reach 2^bits: leave them room below float32's largest number
    weight = divided(weight, gain)

    levels = starting_levels(weight, spec, levels, importance)
    stored = store_scales(*fit_scales(weight, spec, levels, importance), spec)
    codes = kernels.encode(weight, stored.scale, stored.zero, levels, codebooks.thresholds(levels), spec.block_size)
    if spec.codebook in codebooks.FITTED:
        levels = levels_given(weight, stored.scale, codes, levels, spec.block_size, importance)
        levels = rounded_levels(levels, spec)
        codes = kernels.encode(weight, stored.scale, None, levels, codebooks.thresholds(levels), spec.block_size)
    return assemble(codes, stored, levels, spec).times(gain)
