"""The packed matrix product as a torch operator, so that autograd, autocast and ``torch.compile`` see one opaque node.

    y = x Wᵀ,  dL/dx = dL/dy W,  W = dequantize(packed, scale, codebook, zero)

Where :func:`loftq.kernels.few_tokens` says so, on the CPU nearly always, the packed matrix is multiplied as it is.
Elsewhere W is written and handed to torch's product: all of it on a GPU; on the CPU a tile at a time, in a few megabytes
that the next tile uses again, so that it is multiplied while it is in the cache: some of its rows for y, some of its columns
for the gradient, whose sum over rows would otherwise be rounded between tiles. There is no gradient for the backbone: it is
frozen.

The operators take the tensors as they are stored (:func:`loftq.codec.storage_layout`). What autograd keeps for the backward
pass are the layer's own buffers, not copies of them.
"""

from __future__ import annotations

import itertools
import threading
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from loftq import kernels
from loftq.codec.scales import double_dequantize
from loftq.errors import WeightError

_memory = threading.local()
Matrix = tuple[Tensor, Tensor, Tensor, Tensor | None, int, int]  # packed, scale, codebook, zero, bits, block_size
TILE_BYTES = 8 << 20  # which is then multiplied out of the last-level cache


def _workspace(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A (rows, columns) matrix in this thread's memory."""
    needed = rows * columns * dtype.itemsize
    held: Tensor | None = getattr(_memory, "held", None)
    if held is None or held.numel() < needed:
        held = _memory.held = torch.empty(needed, dtype=torch.uint8, device="cpu")
    return held[:needed].view(dtype).view(rows, columns)


def _tiles(count: int, nbytes: int) -> list[tuple[int, int]]:
    """Ranges of ``count`` rows or columns of ``nbytes`` each, as equal as can be, of at most ``TILE_BYTES`` if one fits."""
    tiles = min(count, -(-count * nbytes // TILE_BYTES))
    edges = [count * k // tiles for k in range(tiles + 1)]
    return list(itertools.pairwise(edges))


def workspace_bytes(shape: tuple[int, int], block_size: int, dtype: torch.dtype) -> int:
    """What the largest tile of a (rows, columns) matrix takes, of rows or of columns."""
    rows, columns = shape
    of_rows = _tiles(rows, columns * dtype.itemsize)
    of_blocks = _tiles(-(-columns // block_size), rows * block_size * dtype.itemsize)
    widest = max(min(last * block_size, columns) - first * block_size for first, last in of_blocks)
    return dtype.itemsize * max(columns * max(last - first for first, last in of_rows), rows * widest)


def _shaped(product: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The product in a shape, but no view of it: what an autograd function returns can be changed in place unless it is one."""
    return product if product.shape == shape else torch.ops.aten._unsafe_view(product, shape)


def _few(x: Tensor, features: int) -> bool:
    return 0 < x.numel() <= kernels.few_tokens(x.device.type, x.dtype) * features


def plain_scales(scale: Tensor, absmax: Tensor | None, offset: Tensor | None) -> Tensor:
    """Scales as they are stored, or float32 ones from 8-bit ones, whose ``absmax`` and ``offset`` are given."""
    return scale if absmax is None or offset is None else double_dequantize(scale, absmax, offset)


def _times_transposed(x: Tensor, matrix: Matrix) -> Tensor:
    """x (..., in) Wᵀ, on the CPU with a tile of W's rows at a time."""
    packed, scale, codebook, zero, bits, block_size = matrix
    n = x.shape[-1]
    if packed.device.type != "cpu":
        return torch.nn.functional.linear(x, kernels.dequantize(*matrix, n, x.dtype))
    shape = (*x.shape[:-1], packed.shape[0])
    x = x.reshape(-1, n)
    out = x.new_empty(x.shape[0], packed.shape[0])
    for first, last in _tiles(packed.shape[0], n * x.dtype.itemsize):
        rows = slice(first, last)
        own = codebook if codebook.dim() == 1 else codebook[rows]
        tile_of = (packed[rows], scale[rows], own, None if zero is None else zero[rows], bits, block_size)
        tile = kernels.dequantize(*tile_of, n, x.dtype, _workspace(last - first, n, x.dtype))
        out[:, rows] = torch.nn.functional.linear(x, tile)
    return _shaped(out, shape)


def _times(grad: Tensor, matrix: Matrix, n: int) -> Tensor:
    """grad (..., out) W, W (out, n), on the CPU with a tile of its columns at a time."""
    packed, scale, *_, block_size = matrix
    if packed.device.type != "cpu":
        return grad @ kernels.dequantize(*matrix, n, grad.dtype)
    rows, shape = packed.shape[0], (*grad.shape[:-1], n)
    grad = grad.reshape(-1, rows)
    out = grad.new_empty(grad.shape[0], n)
    for blocks in _tiles(scale.shape[1], rows * block_size * grad.dtype.itemsize):
        columns = slice(blocks[0] * block_size, min(blocks[1] * block_size, n))
        memory = _workspace(rows, columns.stop - columns.start, grad.dtype)
        out[:, columns] = grad @ kernels.dequantize(*matrix, n, grad.dtype, memory, blocks)
    return _shaped(out, shape)


def _linear(
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
    matrix = (packed, plain_scales(scale, absmax, offset), codebook, zero, bits, block_size)
    if not _few(x, n):
        return _times_transposed(x, matrix)
    return _shaped(kernels.product(x.reshape(-1, n), *matrix), (*x.shape[:-1], packed.shape[0]))


packed_linear = torch.library.custom_op("loftq::packed_linear", _linear, mutates_args=())


@packed_linear.register_fake
def _(x, packed, *stored):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _grad_input(
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
    matrix = (packed, plain_scales(scale, absmax, offset), codebook, zero, bits, block_size)
    rows = packed.shape[0]
    if not _few(grad, rows):
        return _times(grad, matrix, in_features)
    return _shaped(kernels.grad_product(grad.reshape(-1, rows), *matrix, in_features), (*grad.shape[:-1], in_features))


packed_linear_grad_input = torch.library.custom_op("loftq::packed_linear_grad_input", _grad_input, mutates_args=())


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
        grad_input = packed_linear_grad_input if _recorded(grad) else _grad_input
        grad_x = grad_input(grad, *stored, *ctx.constants)
    return grad_x, *(None for _ in stored), None, None


packed_linear.register_autograd(_backward, setup_context=_setup_context)


class _PackedLinear(torch.autograd.Function):
    """The same to autograd as the operator, without an operator's cost."""

    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        output = _linear(*inputs)
        _setup_context(ctx, inputs, output)  # as torch itself would call it, which takes as long as a launch
        return output

    backward = staticmethod(_backward)


def _recorded(x: Tensor) -> bool:
    """Whether something watches which operators are called, and with what."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or type(x) is not Tensor


def packed_product(x: Tensor, *stored: Any) -> Tensor:
    """:func:`packed_linear`, or where nothing records operators the function behind it: an operator costs a tenth of a
    millisecond, a third of a small layer's time on the CPU, and more than a large one's on a GPU."""
    if torch.jit.is_tracing():  # it would record memory that the kernels fill behind its back
        raise WeightError(
            "torch.jit.trace cannot record a packed layer, expected torch.compile or torch.export, which see one operator"
        )
    if _recorded(x):
        return packed_linear(x, *stored)
    needs_grad = torch.is_grad_enabled() and x.requires_grad
    return _PackedLinear.apply(x, *stored) if needs_grad else _linear(x, *stored)


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
    # not packed[rows], which would count a negative index from the end
    scale = plain_scales(scale, absmax, offset).index_select(0, rows)  # groups of 8-bit scales run across rows
    zero = None if zero is None else zero.index_select(0, rows)
    codebook = codebook if codebook.dim() == 1 else codebook.index_select(0, rows)
    return kernels.dequantize(packed.index_select(0, rows), scale, codebook, zero, bits, block_size, in_features)


@packed_rows.register_fake
def _(rows, packed, scale, codebook, zero, absmax, offset, bits, block_size, in_features):  # type: ignore[no-untyped-def]
    return scale.new_empty((rows.shape[0], in_features), dtype=torch.float32)
