"""The loops that touch every weight: compiled on the CPU, plain torch elsewhere. Tensors in, tensors out.

Each function here has one definition in :mod:`loftq.kernels.reference`; on the CPU a compiled loop computes the same.
Shapes: weight (rows, in) float32; codes (rows, in) uint8; packed (rows, ceil(in * bits / 8)) uint8; scale and zero
(rows, ceil(in / block_size)) float32; codebook (2^bits,) float32 ascending; thresholds (2^bits - 1,) float32.
"""

import numpy as np
import torch
from torch import Tensor

from loftq.kernels import cpu_fit, cpu_pack, cpu_unpack, reference
from loftq.kernels.reference import packed_row_bytes
from loftq.kernels.threads import for_rows

__all__ = [
    "dequantize",
    "encode",
    "level_moments",
    "pack",
    "packed_row_bytes",
    "search_affine",
    "search_scale",
    "unpack",
]

_NONE = np.empty((0, 0), np.float32)
_SLAB = 64  # rows summed together in level_moments: fixed, so that the sum does not depend on the thread count


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _np(tensor: Tensor | None) -> np.ndarray:
    return _NONE if tensor is None else tensor.detach().contiguous().numpy()


def pack(codes: Tensor, bits: int) -> Tensor:
    """(rows, n) uint8 codes -> (rows, ceil(n * bits / 8)) uint8."""
    if not _on_cpu(codes):
        return reference.pack(codes, bits)
    packed = torch.empty(codes.shape[0], packed_row_bytes(codes.shape[1], bits), dtype=torch.uint8)
    for_rows(cpu_pack.pack_rows, codes.shape[0], codes.numel(), _np(codes), bits, packed.numpy())
    return packed


def unpack(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """The inverse of :func:`pack`."""
    if not _on_cpu(packed):
        return reference.unpack(packed, bits, in_features)
    codes = torch.empty(packed.shape[0], in_features, dtype=torch.uint8)
    for_rows(cpu_pack.unpack_rows, codes.shape[0], codes.numel(), _np(packed), bits, codes.numpy())
    return codes


def dequantize(
    packed: Tensor,
    scale: Tensor,
    codebook: Tensor,
    zero: Tensor | None,
    bits: int,
    block_size: int,
    in_features: int,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """value = scale * (codebook[code] + zero * codebook[1]) as a dense (rows, in_features) matrix of ``dtype``.

    ``out``, on the CPU, is float32 memory to write to: a fresh large tensor costs several times the computation, because
    the system has to provide its pages.
    """
    if not _on_cpu(packed):
        return reference.dequantize(packed, scale, codebook, zero, bits, block_size, in_features).to(dtype)
    if out is None:
        out = torch.empty(packed.shape[0], in_features, dtype=torch.float32)
    loop = cpu_unpack.DEQUANTIZE_ROWS[bits]
    args = (_np(packed), _np(scale), _np(codebook), _np(zero), block_size, in_features, out.numpy())
    for_rows(loop, packed.shape[0], out.numel(), *args)
    return out if dtype == torch.float32 else out.to(dtype)


def encode(
    weight: Tensor, scale: Tensor, zero: Tensor | None, codebook: Tensor, thresholds: Tensor, block_size: int
) -> Tensor:
    """The code of the level nearest to each weight; where the scale is 0, the code of the level nearest to 0."""
    if not _on_cpu(weight):
        return reference.encode(weight, scale, zero, codebook, thresholds, block_size)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    args = (_np(weight), _np(scale), _np(zero), _np(codebook), _np(thresholds), block_size, codes.numpy())
    for_rows(cpu_fit.encode_rows, weight.shape[0], weight.numel(), *args)
    return codes


def search_scale(
    weight: Tensor, codebook: Tensor, thresholds: Tensor, factors: Tensor, refine: int, block_size: int
) -> Tensor:
    """The best of ``absmax * factors`` per block in squared error, then refitted by least squares."""
    if not _on_cpu(weight):
        return reference.search_scale(weight, codebook, thresholds, factors, refine, block_size)
    scale = torch.empty(weight.shape[0], -(-weight.shape[1] // block_size))
    args = (_np(weight), _np(codebook), _np(thresholds), _np(factors), refine, block_size, scale.numpy())
    for_rows(cpu_fit.search_scale_rows, weight.shape[0], weight.numel(), *args)
    return scale


def search_affine(
    weight: Tensor, codebook: Tensor, thresholds: Tensor, factors: Tensor, refine: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """The best (scale, zero) per block over shrunken min/max ranges, each refitted by least squares."""
    if not _on_cpu(weight):
        return reference.search_affine(weight, codebook, thresholds, factors, refine, block_size)
    scale = torch.empty(weight.shape[0], -(-weight.shape[1] // block_size))
    zero = torch.empty_like(scale)
    args = (_np(weight), _np(codebook), _np(thresholds), _np(factors), refine, block_size, scale.numpy(), zero.numpy())
    for_rows(cpu_fit.search_affine_rows, weight.shape[0], weight.numel(), *args)
    return scale, zero


def level_moments(weight: Tensor, scale: Tensor, codes: Tensor, levels: int, block_size: int) -> tuple[Tensor, Tensor]:
    """For each level k: sum of scale * w and sum of scale^2 over the elements with code k, float64."""
    if not _on_cpu(weight):
        return reference.level_moments(weight, scale, codes, levels, block_size)
    slabs = -(-weight.shape[0] // _SLAB)
    num = torch.zeros(slabs, levels, dtype=torch.float64)
    den = torch.zeros_like(num)
    args = (_np(weight), _np(scale), _np(codes), block_size, _SLAB, num.numpy(), den.numpy())
    for_rows(cpu_fit.level_moments_rows, slabs, weight.numel(), *args)
    return num.sum(0), den.sum(0)
