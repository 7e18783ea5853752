"""The packed matrix product as a torch operator, so that autograd, autocast and ``torch.compile`` see one opaque node.

    y = x Wᵀ,  dL/dx = dL/dy W,  W = dequantize(packed, scale, codebook, zero)

W exists for the duration of one call, in memory that the next call of the same thread uses again: as much as the largest
layer needs, once. There is no gradient for the backbone: it is frozen.

For few tokens the packed matrix is multiplied as it is; how few, the device decides. The operators take the tensors as
they are stored (:func:`loftq.codec.storage_layout`). What autograd keeps for the backward pass are the layer's own
buffers, not copies of them.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from loftq import kernels
from loftq.codec.scales import double_dequantize

_memory = threading.local()


def _workspace(packed: Tensor, in_features: int, dtype: torch.dtype) -> Tensor | None:
    """A (rows, in_features) matrix in this thread's memory; ``None`` off the CPU, where torch keeps freed memory."""
    if packed.device.type != "cpu":
        return None
    needed = packed.shape[0] * in_features * dtype.itemsize
    held: Tensor | None = getattr(_memory, "held", None)
    if held is None or held.numel() < needed:
        held = _memory.held = torch.empty(needed, dtype=torch.uint8)
    return held[:needed].view(dtype).view(packed.shape[0], in_features)


def _few(x: Tensor, features: int) -> bool:
    exact_enough = x.dtype in (torch.float32, torch.bfloat16, torch.float16)  # sums are float32
    return exact_enough and 0 < x.numel() <= kernels.few_tokens(x) * features


def plain_scales(scale: Tensor, absmax: Tensor | None, offset: Tensor | None) -> Tensor:
    """Scales as they are stored, or float32 ones from 8-bit ones, whose ``absmax`` and ``offset`` are given."""
    return scale if absmax is None or offset is None else double_dequantize(scale, absmax, offset)


def _dense(
    packed: Tensor,
    scale: Tensor,
    codebook: Tensor,
    zero: Tensor | None,
    bits: int,
    block_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    out = _workspace(packed, in_features, dtype)
    return kernels.dequantize(packed, scale, codebook, zero, bits, block_size, in_features, dtype, out)


@torch.library.custom_op("loftq::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    codebook: Tensor,
    zero: Tensor | None,
    absmax: Tensor | None,
    offset: Tensor | None,
    bits: int,
    block_size: int,
) -> Tensor:
    """x (..., in) -> (..., out) in x's dtype; packed (out, row bytes), scale and zero (out, blocks) as stored."""
    n = x.shape[-1]
    operands = (packed, plain_scales(scale, absmax, offset), codebook, zero, bits, block_size)
    if _few(x, n):
        return kernels.product(x.reshape(-1, n), *operands).view(*x.shape[:-1], -1)
    return torch.nn.functional.linear(x, _dense(*operands, n, x.dtype))


@packed_linear.register_fake
def _(x, packed, *stored):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@torch.library.custom_op("loftq::packed_linear_grad_input", mutates_args=())
def packed_linear_grad_input(
    grad: Tensor,
    packed: Tensor,
    scale: Tensor,
    codebook: Tensor,
    zero: Tensor | None,
    absmax: Tensor | None,
    offset: Tensor | None,
    bits: int,
    block_size: int,
    in_features: int,
) -> Tensor:
    """grad (..., out) -> (..., in): the product with the dequantized matrix itself."""
    operands = (packed, plain_scales(scale, absmax, offset), codebook, zero, bits, block_size)
    if _few(grad, packed.shape[0]):
        product = kernels.grad_product(grad.reshape(-1, packed.shape[0]), *operands, in_features)
        return product.view(*grad.shape[:-1], in_features)
    return grad @ _dense(*operands, in_features, grad.dtype)


@packed_linear_grad_input.register_fake
def _(grad, packed, scale, codebook, zero, absmax, offset, bits, block_size, in_features):  # type: ignore[no-untyped-def]
    return grad.new_empty((*grad.shape[:-1], in_features))


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, *tensors, bits, block_size = inputs
    ctx.save_for_backward(*tensors)
    ctx.constants = (bits, block_size, x.shape[-1])


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    stored = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = packed_linear_grad_input(grad, *stored, *ctx.constants)
    return grad_x, *(None for _ in stored), None, None


packed_linear.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("loftq::packed_rows", mutates_args=())
def packed_rows(
    rows: Tensor,
    packed: Tensor,
    scale: Tensor,
    codebook: Tensor,
    zero: Tensor | None,
    absmax: Tensor | None,
    offset: Tensor | None,
    bits: int,
    block_size: int,
    in_features: int,
) -> Tensor:
    """The dense (n, in) float32 rows of the matrix whose indices ``rows`` (n,) lists: an embedding look-up."""
    scale = plain_scales(scale, absmax, offset)[rows]  # groups of 8-bit scales run across rows
    zero = None if zero is None else zero[rows]
    codebook = codebook if codebook.dim() == 1 else codebook[rows]
    return kernels.dequantize(packed[rows], scale, codebook, zero, bits, block_size, in_features)


@packed_rows.register_fake
def _(rows, packed, scale, codebook, zero, absmax, offset, bits, block_size, in_features):  # type: ignore[no-untyped-def]
    return scale.new_empty((rows.shape[0], in_features), dtype=torch.float32)
