"""Every kernel as compiled CPU loops over rows, in parallel; see :mod:`loftq.kernels` for what each computes."""

import numpy as np
import torch
from torch import Tensor

from loftq.kernels import cpu_feedback, cpu_fit, cpu_pack, cpu_product, cpu_unpack
from loftq.kernels.reference import packed_row_bytes
from loftq.kernels.threads import for_rows

_NONE = np.empty((0, 0), np.float32)
_BITS_AS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}
_CHUNKS = 8  # of rows, summed apart in grad_product
_SLAB = 64  # rows summed together in level_moments: fixed, so that the sum does not depend on the thread count


def _np(tensor: Tensor | None) -> np.ndarray:
    return _NONE if tensor is None else tensor.detach().contiguous().numpy()


def _rows_of(levels: Tensor) -> np.ndarray:
    """Codebook or thresholds as the loops take them: a row for each row of the weight, or one for all."""
    return _np(levels if levels.dim() == 2 else levels[None])


def pack(codes: Tensor, bits: int) -> Tensor:
    packed = torch.empty(codes.shape[0], packed_row_bytes(codes.shape[1], bits), dtype=torch.uint8)
    for_rows(cpu_pack.pack_rows, codes.shape[0], codes.numel(), _np(codes), bits, packed.numpy())
    return packed


def unpack(packed: Tensor, bits: int, in_features: int) -> Tensor:
    codes = torch.empty(packed.shape[0], in_features, dtype=torch.uint8)
    for_rows(cpu_pack.unpack_rows, codes.shape[0], codes.numel(), _np(packed), bits, codes.numpy())
    return codes


def _tables(codebook: Tensor) -> np.ndarray:
    """Levels as the unpacking loops take them: (1 or rows, at least 16), repeated where there are fewer."""
    levels = codebook.float() if codebook.dim() == 2 else codebook.float()[None]
    return _np(levels.repeat(1, max(1, 16 // levels.shape[1])))


def _scales(stored: Tensor | None) -> np.ndarray:
    """Scales or zeros as the unpacking loops take them: float16 as it is stored, by its bits."""
    if stored is None:
        return _NONE
    if stored.dtype == torch.float16:
        return stored.contiguous().view(torch.uint16).numpy()
    return _np(stored.float())


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
    if out is None:
        out = torch.empty(packed.shape[0], in_features, dtype=dtype)
    if dtype not in _BITS_AS:
        return out.copy_(dequantize(packed, scale, codebook, zero, bits, block_size, in_features))
    target = out.view(_BITS_AS[dtype]).numpy()
    args = (_np(packed), _scales(scale), _tables(codebook), _scales(zero), block_size, in_features, target)
    for_rows(cpu_unpack.DEQUANTIZE_ROWS[bits], packed.shape[0], out.numel(), *args)
    return out


FEW_TOKENS = 4
"""Up to so many tokens :func:`product` beats writing the matrix; see benchmarks/README.md."""


def product(
    x: Tensor, packed: Tensor, scale: Tensor, codebook: Tensor, zero: Tensor | None, bits: int, block_size: int
) -> Tensor:
    inputs = x.float()
    blocks = scale.shape[1]
    sums = _NONE
    if zero is not None:
        padded = torch.nn.functional.pad(inputs, (0, blocks * block_size - inputs.shape[1]))
        sums = _np(padded.view(-1, blocks, block_size).sum(-1))
    out = torch.empty(x.shape[0], packed.shape[0])
    args = (_np(packed), _scales(scale), _tables(codebook), _scales(zero), block_size, _np(inputs), sums, out.numpy())
    for_rows(cpu_product.PRODUCT_ROWS[bits], packed.shape[0], packed.shape[0] * inputs.numel(), *args)
    return out.to(x.dtype)


def grad_product(
    grad: Tensor,
    packed: Tensor,
    scale: Tensor,
    codebook: Tensor,
    zero: Tensor | None,
    bits: int,
    block_size: int,
    in_features: int,
) -> Tensor:
    # a fixed number of chunks, so that the result does not depend on the number of threads
    out = torch.empty(_CHUNKS, grad.shape[0], in_features)
    args = (_np(packed), _scales(scale), _tables(codebook), _scales(zero), block_size, _np(grad.float()), out.numpy())
    for_rows(cpu_product.GRAD_ROWS[bits], _CHUNKS, grad.numel() * in_features, *args)
    return out.sum(0).to(grad.dtype)


def encode(
    weight: Tensor, scale: Tensor, zero: Tensor | None, codebook: Tensor, thresholds: Tensor, block_size: int
) -> Tensor:
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    levels = (_rows_of(codebook), _rows_of(thresholds))
    args = (_np(weight), _np(scale), _np(zero), *levels, block_size, codes.numpy())
    for_rows(cpu_fit.encode_rows, weight.shape[0], weight.numel(), *args)
    return codes


def search_scale(
    weight: Tensor,
    importance: Tensor,
    codebook: Tensor,
    thresholds: Tensor,
    factors: Tensor,
    refine: int,
    block_size: int,
) -> Tensor:
    scale = torch.empty(weight.shape[0], -(-weight.shape[1] // block_size))
    tensors = (_np(weight), _np(importance), _rows_of(codebook), _rows_of(thresholds), _np(factors))
    for_rows(cpu_fit.search_scale_rows, weight.shape[0], weight.numel(), *tensors, refine, block_size, scale.numpy())
    return scale


def search_affine(
    weight: Tensor,
    importance: Tensor,
    codebook: Tensor,
    thresholds: Tensor,
    factors: Tensor,
    refine: int,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    scale = torch.empty(weight.shape[0], -(-weight.shape[1] // block_size))
    zero = torch.empty_like(scale)
    tensors = (_np(weight), _np(importance), _rows_of(codebook), _rows_of(thresholds), _np(factors))
    out = (scale.numpy(), zero.numpy())
    for_rows(cpu_fit.search_affine_rows, weight.shape[0], weight.numel(), *tensors, refine, block_size, *out)
    return scale, zero


def level_moments(
    weight: Tensor,
    importance: Tensor,
    scale: Tensor,
    codes: Tensor,
    levels: int,
    block_size: int,
    by_row: bool = False,
) -> tuple[Tensor, Tensor]:
    slab = 1 if by_row else _SLAB
    slabs = -(-weight.shape[0] // slab)
    num = torch.zeros(slabs, levels, dtype=torch.float64)
    den = torch.zeros_like(num)
    tensors = map(_np, (weight, importance, scale, codes))
    out = (num.numpy(), den.numpy())
    for_rows(cpu_fit.level_moments_rows, slabs, weight.numel(), *tensors, block_size, slab, *out)
    return (num, den) if by_row else (num.sum(0), den.sum(0))


def feedback(
    work: Tensor,
    inverse: Tensor,
    order: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    codebook: Tensor,
    thresholds: Tensor,
    block_size: int,
    columns: tuple[int, int],
    codes: Tensor,
    dense: Tensor,
) -> Tensor:
    begin, end = columns
    errors = torch.empty(work.shape[0], end - begin)
    tensors = (*map(_np, (inverse, order, scale, zero)), _rows_of(codebook), _rows_of(thresholds))
    out = (codes.numpy(), dense.numpy(), errors.numpy())
    work_items = work.shape[0] * (end - begin) ** 2 // 4
    for_rows(
        cpu_feedback.feedback_rows, work.shape[0], work_items, work.numpy(), *tensors, block_size, begin, end, *out
    )
    return errors


def descend(
    gradient: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    codebook: Tensor,
    thresholds: Tensor,
    block_size: int,
    codes: Tensor,
    dense: Tensor,
    sweeps: int,
    refit: bool,
) -> None:
    constants = (_np(zero), _rows_of(codebook), _rows_of(thresholds), block_size)
    out = (codes.numpy(), dense.numpy())
    rows, n = gradient.shape
    state = (gradient.numpy(), _np(hessian), scale.numpy())
    for_rows(cpu_feedback.descend_rows, rows, rows * n * n // 4, *state, *constants, *out, sweeps, refit)
    return None


def descend_coupled(
    error: Tensor,
    hessian: Tensor,
    coupling: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    codebook: Tensor,
    thresholds: Tensor,
    block_size: int,
    codes: Tensor,
    dense: Tensor,
    refit: bool,
) -> None:
    product = (error @ hessian).contiguous()
    shares = coupling / coupling.diagonal()[:, None]
    levels = (_rows_of(codebook), _rows_of(thresholds))
    constants = (_np(hessian), scale.numpy(), _np(zero), *levels, block_size)
    for first in range(0, error.shape[0], _SLAB):
        last = min(first + _SLAB, error.shape[0])
        gradient = (shares[first:last] @ product).numpy()
        cpu_feedback.descend_coupled(
            first, last, gradient, _np(coupling), product.numpy(), *constants, codes.numpy(), dense.numpy(), refit
        )
