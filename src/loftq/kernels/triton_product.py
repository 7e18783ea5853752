"""Triton kernels for products of few tokens with a packed matrix, which is read once and never written out.

One token is a matter of instructions first, then of memory bandwidth: a warp has a few rows, multiplies levels and inputs in
float32 and the sum of each group of codes by its block's scale. Several tokens go to the matrix units, sixteen at a time,
with W rounded to their dtype as a dense product has it. Where a product has too few tiles to fill the device, the sum is
split into parts that are added afterwards, in order: the same call gives the same bits. Which tiles are fastest is measured
once for each shape, and may round differently on another device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loftq.kernels.triton_codes import (
    load_groups,
    load_levels,
    load_per_group,
    load_step,
    load_values,
    load_within,
    split_codes,
)
from loftq.kernels.triton_launch import handed_over, on_device, processors, tuned

_TILE_TOKENS = 16  # of the matrix units


def few_tokens(dtype: torch.dtype) -> int:
    """A tile of the matrix units; beyond, the matrix is written once and multiplied by the vendor's kernels."""
    return _TILE_TOKENS


_COLUMNS = 256  # of a warp's tile: a thread has one group of each row, as the packed units are loaded
_VECTOR = [
    triton.Config({"ROWS": rows, "UNROLL": unroll}, num_warps=1)  # unrolling keeps enough loads under way
    for rows, unroll in ((2, 4), (2, 8), (2, 2), (4, 4), (4, 2), (4, 8))
]
_MATRIX = [
    triton.Config({"ROWS": rows, "K": k}, num_warps=warps, num_stages=stages)
    for rows, k, warps, stages in (
        (32, 64, 4, 2),
        (16, 128, 2, 3),
        (32, 128, 4, 3),
        (16, 256, 4, 2),
        (64, 64, 4, 3),
        (32, 64, 4, 1),
        (16, 128, 2, 1),
    )
]
_TRANSPOSED = [
    triton.Config({"ROWS": rows, "K": k}, num_warps=warps, num_stages=stages)
    for rows, k, warps, stages in ((16, 128, 4, 2), (32, 64, 4, 3), (32, 128, 4, 3), (64, 64, 4, 2), (32, 128, 4, 1))
]


@triton.jit
def _tables(codebook, row, BITS: tl.constexpr, BY_ROW: tl.constexpr):
    """The levels of a row, one to a thread, for :func:`_values`: of the first code, and of the second of two at 2 bits."""
    SIZE: tl.constexpr = 1 << (2 * BITS if BITS == 2 else BITS)
    number = tl.arange(0, SIZE)
    start = codebook + row * (1 << BITS) if BY_ROW else codebook
    first, second = tl.load(start + number % (1 << BITS)), tl.load(start + number // (1 << BITS))
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _values(tables, bits, codebook, row, BITS: tl.constexpr, BY_ROW: tl.constexpr, GROUPS: tl.constexpr):
    """(1, GROUPS, 8) float32 levels of the codes in groups (1, GROUPS).

    Threads of a warp give each other the levels that they hold, which takes fewer instructions than to load them, the fewest
    at 2 bits, where one number stands for two codes.
    """
    if BITS == 2:
        pairs = tl.reshape(
            (bits[:, :, None] >> (tl.arange(0, 4) * 4).to(bits.dtype)[None, None, :]) & 15, (GROUPS * 4,)
        )
        first, second = tl.gather(tables[0], pairs.to(tl.int32), 0), tl.gather(tables[1], pairs.to(tl.int32), 0)
        return tl.reshape(tl.join(first, second), (1, GROUPS, 8))
    codes = split_codes(bits, BITS)
    if BITS == 8:  # too many for the threads of a warp
        return load_levels(codebook, row + tl.zeros((1,), tl.int64), codes, BITS, BY_ROW)
    return tl.reshape(tl.gather(tables[0], tl.reshape(codes.to(tl.int32), (GROUPS * 8,)), 0), (1, GROUPS, 8))


@triton.jit
def _dots(
    inputs,
    tables,
    matrix,
    row,
    first,
    n,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BY_ROW: tl.constexpr,
    GROUPS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """(1, GROUPS): products of each group of eight values of one row with its inputs (1, GROUPS, 8)."""
    units, scale, zero, codebook, length, blocks = matrix
    rows = row + tl.zeros((1,), tl.int64)
    bits = load_groups(units, rows * length, first, length, BITS, ALIGNED, GROUPS, WHOLE)
    dot = tl.sum(_values(tables, bits, codebook, row, BITS, BY_ROW, GROUPS) * inputs, 2)
    if HAS_ZERO:
        offset = load_per_group(zero, rows, first, n, blocks, BLOCK, GROUPS, WHOLE)
        dot += offset * load_step(codebook, rows, BITS, BY_ROW)[:, None] * tl.sum(inputs, 2)
    return dot * load_per_group(scale, rows, first, n, blocks, BLOCK, GROUPS, WHOLE)


@tuned(_VECTOR, ["rows", "n", "BITS"])
@triton.jit
def _vector(
    x,
    units,
    scale,
    zero,
    codebook,
    out,
    rows,
    length,
    blocks,
    n: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BY_ROW: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """out[r] = sum over i of W[r, i] x[i], of two or four rows, which share what is done to the inputs."""
    GROUPS: tl.constexpr = K // 8
    WHOLE: tl.constexpr = n % K == 0
    matrix = (units, scale, zero, codebook, length, blocks)
    row = tl.program_id(0).to(tl.int64) * ROWS
    row1, row2, row3 = tl.minimum(row + 1, rows - 1), tl.minimum(row + 2, rows - 1), tl.minimum(row + 3, rows - 1)
    tables, tables1 = _tables(codebook, row, BITS, BY_ROW), _tables(codebook, row1, BITS, BY_ROW)
    tables2, tables3 = _tables(codebook, row2, BITS, BY_ROW), _tables(codebook, row3, BITS, BY_ROW)
    total = tl.zeros((1, GROUPS), tl.float32)
    total1, total2, total3 = total, total, total
    for first in tl.range(0, n, K, loop_unroll_factor=UNROLL):
        at = tl.arange(0, GROUPS)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
        inputs = load_within(x + first + at, at, n - first, WHOLE).to(tl.float32)
        total += _dots(inputs, tables, matrix, row, first, n, BITS, BLOCK, ALIGNED, HAS_ZERO, BY_ROW, GROUPS, WHOLE)
        total1 += _dots(inputs, tables1, matrix, row1, first, n, BITS, BLOCK, ALIGNED, HAS_ZERO, BY_ROW, GROUPS, WHOLE)
        if ROWS == 4:
            total2 += _dots(
                inputs, tables2, matrix, row2, first, n, BITS, BLOCK, ALIGNED, HAS_ZERO, BY_ROW, GROUPS, WHOLE
            )
            total3 += _dots(
                inputs, tables3, matrix, row3, first, n, BITS, BLOCK, ALIGNED, HAS_ZERO, BY_ROW, GROUPS, WHOLE
            )
    tl.store(out + row, tl.sum(total).to(out.dtype.element_ty))
    tl.store(out + row + 1, tl.sum(total1).to(out.dtype.element_ty), mask=row + 1 < rows)
    if ROWS == 4:
        tl.store(out + row + 2, tl.sum(total2).to(out.dtype.element_ty), mask=row + 2 < rows)
        tl.store(out + row + 3, tl.sum(total3).to(out.dtype.element_ty), mask=row + 3 < rows)


@tuned(_MATRIX, ["rows", "n", "BITS"])
@triton.jit
def _matrix(
    x,
    units,
    scale,
    zero,
    codebook,
    out,
    tokens,
    rows,
    n,
    length,
    blocks,
    share,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BY_ROW: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
):
    """out[p, t, r] = sum over the columns i of part p of x[t, i] W[r, i]; parts of ``share`` columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    held = tl.minimum(row, rows - 1)
    part = tl.program_id(1)
    token = tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for first in range(part * share, min((part + 1) * share, n), K):
        column = first + tl.arange(0, K)
        inside = (token < tokens)[:, None] & (column < n)[None, :]
        inputs = tl.load(x + (token[:, None] * n + column[None, :]), mask=inside, other=0)
        values = load_values(
            units,
            scale,
            zero,
            codebook,
            held,
            first,
            n,
            length,
            blocks,
            BITS,
            BLOCK,
            ALIGNED,
            HAS_ZERO,
            BY_ROW,
            K // 8,
            False,
        )
        total = tl.dot(inputs, tl.trans(tl.reshape(values.to(inputs.dtype), (ROWS, K))), total, input_precision="ieee")
    target = out + (part * tokens + token[:, None]).to(tl.int64) * rows + row[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(token < tokens)[:, None] & (row < rows)[None, :])


@tuned(_TRANSPOSED, ["rows", "n", "BITS"])
@triton.jit
def _transposed(
    grad,
    units,
    scale,
    zero,
    codebook,
    out,
    tokens,
    rows,
    n,
    length,
    blocks,
    share,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BY_ROW: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
):
    """out[p, t, i] = sum over the rows r of part p of grad[t, r] W[r, i]; parts of ``share`` rows."""
    first = tl.program_id(0) * K
    part = tl.program_id(1)
    token = tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, K), tl.float32)
    for begin in range(part * share, min((part + 1) * share, rows), ROWS):
        row = begin + tl.arange(0, ROWS)
        inside = (token < tokens)[:, None] & (row < rows)[None, :]
        inputs = tl.load(grad + (token[:, None] * rows + row[None, :]), mask=inside, other=0)
        values = load_values(
            units,
            scale,
            zero,
            codebook,
            tl.minimum(row, rows - 1).to(tl.int64),
            first,
            n,
            length,
            blocks,
            BITS,
            BLOCK,
            ALIGNED,
            HAS_ZERO,
            BY_ROW,
            K // 8,
            False,
        )
        total = tl.dot(inputs, tl.reshape(values.to(inputs.dtype), (ROWS, K)), total, input_precision="ieee")
    column = first + tl.arange(0, K)
    target = out + (part * tokens + token[:, None]).to(tl.int64) * n + column[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(token < tokens)[:, None] & (column < n)[None, :])


_MANY = {"TOKENS": _TILE_TOKENS, "enable_fp_fusion": True}


def _parts(tiles: int, summed: int, tensor: Tensor) -> tuple[int, int]:
    """Into how many parts to split a sum so that ``tiles`` of them fill the device, and the terms of each: many 128s."""
    wanted = triton.cdiv(4 * processors(tensor), tiles)
    share = triton.cdiv(triton.cdiv(summed, min(wanted, 16)), 128) * 128
    return triton.cdiv(summed, share), share


def _chunks(x: Tensor) -> list[Tensor]:
    return list(x.contiguous().split(_TILE_TOKENS))


def product(
    x: Tensor, packed: Tensor, scale: Tensor, codebook: Tensor, zero: Tensor | None, bits: int, block_size: int
) -> Tensor:
    if x.shape[0] > _TILE_TOKENS:
        rest = (packed, scale, codebook, zero, bits, block_size)
        return torch.cat([product(chunk, *rest) for chunk in _chunks(x)])
    x = x.contiguous()
    (tokens, n), rows = x.shape, packed.shape[0]
    if tokens * rows * n == 0:
        return x.new_zeros(tokens, rows)
    m = handed_over(packed, scale, codebook, zero, bits, block_size)
    if tokens == 1:
        out = x.new_empty(1, rows)
        with on_device(x):
            _vector(
                lambda meta: (triton.cdiv(rows, meta["ROWS"]),),
                x,
                *m.operands,
                out,
                rows,
                *m.sizes,
                n=n,
                K=_COLUMNS,
                **m.constants,
                enable_fp_fusion=True,
            )
        return out
    parts, share = _parts(triton.cdiv(rows, 32), n, x)
    out = x.new_empty(parts, tokens, rows, dtype=x.dtype if parts == 1 else torch.float32)
    with on_device(x):
        _matrix(
            lambda meta: (triton.cdiv(rows, meta["ROWS"]), parts),
            x,
            *m.operands,
            out,
            tokens,
            rows,
            n,
            *m.sizes,
            share,
            **m.constants,
            **_MANY,
        )
    return out[0] if parts == 1 else out.sum(0).to(x.dtype)


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
    if grad.shape[0] > _TILE_TOKENS:
        rest = (packed, scale, codebook, zero, bits, block_size, in_features)
        return torch.cat([grad_product(chunk, *rest) for chunk in _chunks(grad)])
    grad = grad.contiguous()
    tokens, rows = grad.shape
    if tokens * rows * in_features == 0:
        return grad.new_zeros(tokens, in_features)
    m = handed_over(packed, scale, codebook, zero, bits, block_size)
    parts, share = _parts(triton.cdiv(in_features, 128), rows, grad)
    out = grad.new_empty(parts, tokens, in_features, dtype=grad.dtype if parts == 1 else torch.float32)
    with on_device(grad):
        _transposed(
            lambda meta: (triton.cdiv(in_features, meta["K"]), parts),
            grad,
            *m.operands,
            out,
            tokens,
            rows,
            in_features,
            *m.sizes,
            share,
            **m.constants,
            **_MANY,
        )
    return out[0] if parts == 1 else out.sum(0).to(grad.dtype)
