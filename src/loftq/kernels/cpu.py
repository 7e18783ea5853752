"""Every kernel as compiled CPU loops over rows, in parallel; see :mod:`loftq.kernels` for what each computes."""

import sys

import llvmlite.binding as llvm
import numpy as np
import torch
from torch import Tensor

from loftq.kernels import cpu_feedback, cpu_fit, cpu_pack, cpu_product, cpu_tiles, cpu_tokens, cpu_unpack
from loftq.kernels.reference import packed_row_bytes
from loftq.kernels.simd_levels import WIDTHS
from loftq.kernels.simd_tiles import BFLOAT16
from loftq.kernels.threads import for_rows

_NONE = np.empty((0, 0), np.float32)
_HAS_AMX = bool(llvm.get_host_cpu_features().get("amx-bf16"))
_CHUNKS = 8  # of rows, summed apart in grad_product
_SLAB = 64  # rows summed together in level_moments: fixed, so that the sum does not depend on the thread count


def _np(tensor: Tensor | None) -> np.ndarray:
    return _NONE if tensor is None else tensor.detach().contiguous().numpy()


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for what a loop writes, which takes the dtype of its arguments for granted: not torch's defaults."""
    return torch.empty(*shape, dtype=dtype, device="cpu")


def _rows_of(levels: Tensor) -> np.ndarray:
    """Codebook or thresholds as the loops take them: float32, a row for each row of the weight, or one for all."""
    return _np(levels.float() if levels.dim() == 2 else levels.float()[None])


def pack(codes: Tensor, bits: int) -> Tensor:
    packed = _empty(codes.shape[0], packed_row_bytes(codes.shape[1], bits), dtype=torch.uint8)
    for_rows(cpu_pack.pack_rows, codes.shape[0], codes.numel(), _np(codes), bits, packed.numpy())
    return packed


def unpack(packed: Tensor, bits: int, in_features: int) -> Tensor:
    codes = _empty(packed.shape[0], in_features, dtype=torch.uint8)
    for_rows(cpu_pack.unpack_rows, codes.shape[0], codes.numel(), _np(packed), bits, codes.numpy())
    return codes


def _borders(thresholds: Tensor) -> np.ndarray:
    """Borders between levels as the fitting loops take them: (1 or rows, at least 16), filled up with infinities."""
    rows = thresholds.float() if thresholds.dim() == 2 else thresholds.float()[None]
    return _np(torch.nn.functional.pad(rows, (0, max(16, rows.shape[1] + 1) - rows.shape[1]), value=float("inf")))


def _width_of(codebook: Tensor) -> tuple[int, ...]:
    return WIDTHS[codebook.shape[-1].bit_length() - 1]


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
    blocks: tuple[int, int] | None = None,
) -> Tensor:
    begin, end = blocks or (0, scale.shape[1])
    columns = slice(begin * block_size, min(end * block_size, in_features))
    if out is None:
        out = _empty(packed.shape[0], columns.stop - columns.start, dtype=dtype)
    if dtype not in cpu_tokens.BITS_AS:
        whole = dequantize(packed, scale, codebook, zero, bits, block_size, in_features, blocks=blocks)
        return out.copy_(whole)
    target = out.view(cpu_tokens.BITS_AS[dtype]).numpy()
    stored = (WIDTHS[bits], _np(packed), _scales(scale), _rows_of(codebook), _scales(zero))
    args = (*stored, block_size, in_features, begin, end, target)
    for_rows(cpu_unpack.dequantize_rows, packed.shape[0], out.numel(), *args)
    return out


_ROW_BY_ROW = 4  # up to so many tokens every row is multiplied as it is read


def few_tokens(dtype: torch.dtype) -> int:
    """All of float32: sums in registers beat torch's, and the matrix is not written. Products of bfloat16 are as fast as
    writing the matrix where it is large, faster below; with matrix units (AMX), which no loop here uses, only the smallest."""
    if dtype == torch.bfloat16:
        return 16 if _HAS_AMX else 256 if BFLOAT16 else sys.maxsize
    return sys.maxsize


def product(
    x: Tensor, packed: Tensor, scale: Tensor, codebook: Tensor, zero: Tensor | None, bits: int, block_size: int
) -> Tensor:
    stored = (WIDTHS[bits], _np(packed), _scales(scale), _rows_of(codebook), _scales(zero))
    if x.shape[0] > _ROW_BY_ROW:
        return cpu_tokens.product(cpu_tiles.product_strips, x, packed.shape[0], stored, block_size, x.shape[1])
    inputs = x.float()
    blocks = scale.shape[1]
    sums = _NONE
    if zero is not None:
        padded = torch.nn.functional.pad(inputs, (0, blocks * block_size - inputs.shape[1]))
        sums = _np(padded.view(-1, blocks, block_size).sum(-1))
    chunk = cpu_product.chunk_columns(bits, block_size)
    whole = inputs.shape[1] // chunk * chunk if chunk else 0
    chunked = inputs[:, :whole].unflatten(1, (-1, 16, 32 // bits)).transpose(2, 3).flatten(1) if whole else inputs
    out = _empty(x.shape[0], packed.shape[0])
    each = (0,) * max(1, 512 // bits // block_size)
    given = (_np(inputs), _np(chunked), whole, sums, out.numpy())
    work = packed.shape[0] * inputs.numel() // 8  # of an element it takes an eighth of what writing it takes
    for_rows(cpu_product.product_rows, packed.shape[0], work, stored[0], each, *stored[1:], block_size, *given)
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
    stored = (WIDTHS[bits], _np(packed), _scales(scale), _rows_of(codebook), _scales(zero))
    if grad.shape[0] > _ROW_BY_ROW:
        return cpu_tokens.product(cpu_tiles.grad_strips, grad, in_features, stored, block_size, in_features)
    out = _empty(_CHUNKS, grad.shape[0], in_features)
    args = (*stored, block_size, _np(grad.float()), out.numpy())
    for_rows(cpu_product.grad_rows, _CHUNKS, grad.numel() * in_features, *args)
    return out.sum(0).to(grad.dtype)


def encode(
    weight: Tensor, scale: Tensor, zero: Tensor | None, codebook: Tensor, thresholds: Tensor, block_size: int
) -> Tensor:
    codes = _empty(*weight.shape, dtype=torch.uint8)
    levels = (_rows_of(codebook), _borders(thresholds))
    args = (_width_of(codebook), _np(weight), _np(scale), _np(zero), *levels, block_size, codes.numpy())
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
    scale = _empty(weight.shape[0], -(-weight.shape[1] // block_size))
    levels = (_rows_of(codebook), _borders(thresholds))
    tensors = (_width_of(codebook), _np(weight), _np(importance), *levels, _np(factors))
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
    scale = _empty(weight.shape[0], -(-weight.shape[1] // block_size))
    zero = torch.empty_like(scale)
    levels = (_rows_of(codebook), _borders(thresholds))
    tensors = (_width_of(codebook), _np(weight), _np(importance), *levels, _np(factors))
    args = (*tensors, refine, block_size, scale.numpy(), zero.numpy())
    for_rows(cpu_fit.search_affine_rows, weight.shape[0], weight.numel(), *args)
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
    num = torch.zeros(slabs, levels, dtype=torch.float64, device="cpu")
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
    errors = _empty(work.shape[0], end - begin)
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
