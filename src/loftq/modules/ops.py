"""The packed matrix product as a torch operator, so that autograd, autocast and ``torch.compile`` see one opaque node.

    y = x Wᵀ,  dL/dx = dL/dy W,  W = dequantize(packed, scale, codebook, zero)

W exists for the duration of one call, in memory that the next call of the same thread uses again: as much as the largest
layer needs, once. There is no gradient for the backbone: it is frozen.

The operators take the tensors as they are stored (:func:`loftq.codec.storage_layout`) and turn scales, zeros and levels into
float32 inside. What autograd keeps for the backward pass are the layer's own buffers, not copies of them.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from loftq import kernels
from loftq.codec.scales import double_dequantize

_memory = threading.local()


def _workspace(packed: Tensor, in_features: int) -> Tensor | None:
    """A float32 (rows, in_features) matrix in this thread's memory; ``None`` off the CPU."""
    if packed.device.type != "cpu":
        return None
    needed = packed.shape[0] * in_features
    held: Tensor | None = getattr(_memory, "held", None)
    if held is None or held.numel() < needed:
        held = _memory.held = torch.empty(needed, dtype=torch.float32)
    return held[:needed].view(packed.shape[0], in_features)


def float_stored(
    scale: Tensor, codebook: Tensor, zero: Tensor | None, absmax: Tensor | None, offset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Stored scales, levels and zeros in float32; ``absmax`` and ``offset`` are those of 8-bit scales."""
    if absmax is not None and offset is not None:
        scale = double_dequantize(scale, absmax, offset)
    return scale.float(), codebook.float(), None if zero is None else zero.float()


def _dense(
    packed: Tensor,
    scale: Tensor,
    codebook: Tensor,
    zero: Tensor | None,
    absmax: Tensor | None,
    offset: Tensor | None,
    bits: int,
    block_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    floats = float_stored(scale, codebook, zero, absmax, offset)
    out = _workspace(packed, in_features)
    return kernels.dequantize(packed, *floats, bits, block_size, in_features, dtype, out)


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
    dense = _dense(packed, scale, codebook, zero, absmax, offset, bits, block_size, x.shape[-1], x.dtype)
    return torch.nn.functional.linear(x, dense)


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
    return grad @ _dense(packed, scale, codebook, zero, absmax, offset, bits, block_size, in_features, grad.dtype)


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
    if absmax is not None and offset is not None:  # its groups of scales run across rows
        scale, absmax, offset = double_dequantize(scale, absmax, offset), None, None
    zero = None if zero is None else zero[rows]
    codebook = codebook if codebook.dim() == 1 else codebook[rows]
    floats = float_stored(scale[rows], codebook, zero, absmax, offset)
    return kernels.dequantize(packed[rows], *floats, bits, block_size, in_features)


@packed_rows.register_fake
def _(rows, packed, scale, codebook, zero, absmax, offset, bits, block_size, in_features):  # type: ignore[no-untyped-def]
    return scale.new_empty((rows.shape[0], in_features), dtype=torch.float32)
