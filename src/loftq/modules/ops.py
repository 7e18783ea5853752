"""The packed matrix product as a torch operator, so that autograd, autocast and ``torch.compile`` see one opaque node.

    y = x Wᵀ,  dL/dx = dL/dy W,  W = dequantize(packed, scale, codebook, zero)

W exists for the duration of one call, in memory that the next call of the same thread uses again: as much as the largest
layer needs, once. There is no gradient for the backbone: it is frozen.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from loftq import kernels
from loftq.codec import scales

_memory = threading.local()
# Up to so many tokens the packed matrix is multiplied as it is; see benchmarks/README.md.
FEW_TOKENS = 4


def _workspace(packed: Tensor, in_features: int, dtype: torch.dtype) -> Tensor | None:
    """A (rows, in_features) matrix in this thread's memory; ``None`` off the CPU."""
    if packed.device.type != "cpu":
        return None
    needed = packed.shape[0] * in_features * dtype.itemsize
    held: Tensor | None = getattr(_memory, "held", None)
    if held is None or held.numel() < needed:
        held = _memory.held = torch.empty(needed, dtype=torch.uint8)
    return held[:needed].view(dtype).view(packed.shape[0], in_features)


def _few(x: Tensor, features: int) -> bool:
    exact_enough = x.dtype in (torch.float32, torch.bfloat16, torch.float16)  # sums are float32
    return exact_enough and x.device.type == "cpu" and x.numel() <= FEW_TOKENS * features


@torch.library.custom_op("loftq::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor, packed: Tensor, scale: Tensor, codebook: Tensor, zero: Tensor | None, bits: int, block_size: int
) -> Tensor:
    """x (..., in) -> (..., out) in x's dtype; packed (out, row bytes), scale and zero (out, blocks) as they are stored."""
    n = x.shape[-1]
    if _few(x, n):
        y = kernels.product(x.reshape(-1, n), packed, scale, codebook, zero, bits, block_size)
        return y.view(*x.shape[:-1], -1)
    out = _workspace(packed, n, x.dtype)
    dense = kernels.dequantize(packed, scale, codebook, zero, bits, block_size, n, x.dtype, out)
    return torch.nn.functional.linear(x, dense)


@packed_linear.register_fake
def _(x, packed, scale, codebook, zero, bits, block_size):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@torch.library.custom_op("loftq::packed_linear_grad_input", mutates_args=())
def packed_linear_grad_input(
    grad: Tensor,
    packed: Tensor,
    scale: Tensor,
    codebook: Tensor,
    zero: Tensor | None,
    bits: int,
    block_size: int,
    in_features: int,
) -> Tensor:
    """grad (..., out) -> (..., in): the product with the dequantized matrix itself."""
    if _few(grad, packed.shape[0]):
        flat = grad.reshape(-1, packed.shape[0])
        product = kernels.grad_product(flat, packed, scale, codebook, zero, bits, block_size, in_features)
        return product.view(*grad.shape[:-1], in_features)
    out = _workspace(packed, in_features, grad.dtype)
    dense = kernels.dequantize(packed, scale, codebook, zero, bits, block_size, in_features, grad.dtype, out)
    return grad @ dense


@packed_linear_grad_input.register_fake
def _(grad, packed, scale, codebook, zero, bits, block_size, in_features):  # type: ignore[no-untyped-def]
    return grad.new_empty((*grad.shape[:-1], in_features))


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, packed, scale, codebook, zero, bits, block_size = inputs
    ctx.save_for_backward(packed, scale, codebook, zero)
    ctx.bits, ctx.block_size, ctx.in_features = bits, block_size, x.shape[-1]


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    packed, scale, codebook, zero = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = packed_linear_grad_input(
            grad, packed, scale, codebook, zero, ctx.bits, ctx.block_size, ctx.in_features
        )
    return grad_x, None, None, None, None, None, None


packed_linear.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("loftq::double_dequantize", mutates_args=())
def double_dequantize(codes: Tensor, absmax: Tensor, offset: Tensor) -> Tensor:
    """float32 scales from 8-bit ones (:func:`loftq.codec.scales.double_dequantize`)."""
    return scales.double_dequantize(codes, absmax, offset)


@double_dequantize.register_fake
def _(codes, absmax, offset):  # type: ignore[no-untyped-def]
    return absmax.new_empty(codes.shape)


@torch.library.custom_op("loftq::packed_rows", mutates_args=())
def packed_rows(
    rows: Tensor,
    packed: Tensor,
    scale: Tensor,
    codebook: Tensor,
    zero: Tensor | None,
    bits: int,
    block_size: int,
    in_features: int,
) -> Tensor:
    """The dense (n, in) float32 rows of the matrix whose indices ``rows`` (n,) lists: an embedding look-up."""
    zero = None if zero is None else zero[rows]
    codebook = codebook if codebook.dim() == 1 else codebook[rows]
    return kernels.dequantize(packed[rows], scale[rows], codebook, zero, bits, block_size, in_features)


@packed_rows.register_fake
def _(rows, packed, scale, codebook, zero, bits, block_size, in_features):  # type: ignore[no-untyped-def]
    return scale.new_empty((rows.shape[0], in_features), dtype=torch.float32)
