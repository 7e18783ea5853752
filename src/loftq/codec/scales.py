"""How a block's scale is stored: in a float dtype, or in 8 bits (double quantization)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loftq.codec.codebook import dynamic_map, thresholds

GROUP = 256  # scales that share one absmax in double quantization (QLoRA)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class DoubleQuantized(NamedTuple):
    """Scales in 8 bits: ``dynamic_map[codes] * absmax[group] + offset``."""

    codes: Tensor  # uint8, shape of the scales
    absmax: Tensor  # float32, one a group of 256 scales in row-major order
    offset: Tensor  # float32 scalar: the mean of the scales


def double_quantize(scale: Tensor) -> DoubleQuantized:
    """QLoRA's second quantization (arXiv 2305.14314, section 3): subtract the mean, then 8 bits in groups of 256."""
    offset = scale.mean()
    flat = (scale - offset).flatten()
    groups = torch.nn.functional.pad(flat, (0, -flat.numel() % GROUP)).view(-1, GROUP)
    absmax = groups.abs().amax(1)
    normalised = groups / torch.where(absmax == 0, 1.0, absmax).unsqueeze(1)
    levels = dynamic_map(scale.device)
    codes = torch.bucketize(normalised, thresholds(levels)).to(torch.uint8)
    return DoubleQuantized(codes.flatten()[: flat.numel()].view(scale.shape), absmax, offset)


def double_dequantize(codes: Tensor, absmax: Tensor, offset: Tensor) -> Tensor:
    """float32 scales from :class:`DoubleQuantized`'s parts."""
    levels = dynamic_map(codes.device)[codes.flatten().long()]
    per_scale = absmax.repeat_interleave(GROUP)[: levels.numel()]
    return (levels * per_scale + offset).view(codes.shape)
