"""Triton kernels that round a matrix under a full second moment of its inputs; see :mod:`loftq.kernels.cpu_feedback`.

Each program holds some rows of one block of columns and walks these one after the other. What the block changes in all
other columns is one dense product afterwards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loftq.kernels import cpu
from loftq.kernels.triton_codes import nearest
from loftq.kernels.triton_launch import EXACT, on_device
from loftq.kernels.triton_search import bits_of, middle_of

_ROWS = 16


@triton.jit
def _best(x, s, offset, levels, borders, BITS: tl.constexpr):
    """The code nearest to x / scale, and its value."""
    code = nearest(tl.div_rn(x, tl.where(s == 0, 1.0, s)) - offset, borders, BITS)
    return code, s * (tl.load(levels + code) + offset)


@triton.jit
def _feedback(
    work,
    inverse,
    order,
    scale,
    zero,
    codebook,
    thresholds,
    middle,
    codes,
    dense,
    errors,
    rows,
    n,
    blocks,
    begin,
    count,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BY_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    row = tl.minimum(row, rows - 1)
    own = row if BY_ROW else tl.zeros_like(row)
    levels, borders = codebook + own * (1 << BITS), thresholds + own * ((1 << BITS) - 1)
    step, at_zero = tl.load(levels + 1), tl.load(middle + own)
    column = tl.arange(0, K)
    here = tl.load(work + row[:, None] * n + begin + column[None, :], mask=(column < count)[None, :], other=0)
    for j in range(count):
        i = tl.load(order + begin + j)
        x = tl.sum(tl.where((column == j)[None, :], here, 0.0), 1)
        s = tl.load(scale + row * blocks + i // BLOCK)
        offset = tl.zeros_like(s)
        if HAS_ZERO:
            offset = tl.load(zero + row * blocks + i // BLOCK) * step
        code, value = _best(x, s, offset, levels, borders, BITS)
        code = tl.where(s == 0, at_zero, code)
        value = tl.where(s == 0, 0.0, value)
        tl.store(codes + row * n + i, code.to(tl.uint8), mask=exists)
        tl.store(dense + row * n + i, value, mask=exists)
        shares = inverse + (begin + j).to(tl.int64) * n + begin
        error = tl.div_rn(x - value, tl.load(shares + j) + tl.zeros_like(x))
        tl.store(errors + row * count + j, error, mask=exists)
        later = tl.load(shares + column, mask=(column > j) & (column < count), other=0)
        here -= error[:, None] * later[None, :]


@triton.jit
def _descend(
    gradient,
    hessian,
    scale,
    zero,
    codebook,
    thresholds,
    codes,
    dense,
    moves,
    rows,
    n,
    blocks,
    block,
    count,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BY_ROW: tl.constexpr,
    REFIT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One visit to a block's codes and scale; ``moves`` (rows, count) receives what it adds to ``dense``."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    row = tl.minimum(row, rows - 1)
    own = row if BY_ROW else tl.zeros_like(row)
    levels, borders = codebook + own * (1 << BITS), thresholds + own * ((1 << BITS) - 1)
    column = tl.arange(0, BLOCK)
    inside = (column < count)[None, :]
    first = block * BLOCK
    places = row[:, None] * n + first + column[None, :]
    g = tl.load(gradient + places, mask=inside, other=0)
    value = tl.load(dense + places, mask=inside, other=0)
    code = tl.load(codes + places, mask=inside, other=0).to(tl.int32)
    before = value
    s = tl.load(scale + row * blocks + block)
    offset = tl.zeros_like(s)
    if HAS_ZERO:
        offset = tl.load(zero + row * blocks + block) * tl.load(levels + 1)
    for j in range(count):
        shares = hessian + (first + j).to(tl.int64) * n + first
        mine = (column == j)[None, :]
        old_value = tl.sum(tl.where(mine, value, 0.0), 1)
        old_code = tl.sum(tl.where(mine, code, 0), 1)
        wanted = old_value + tl.div_rn(tl.sum(tl.where(mine, g, 0.0), 1), tl.load(shares + j) + tl.zeros_like(s))
        new_code, new_value = _best(wanted, s, offset, levels, borders, BITS)
        moved = (new_code != old_code) & (s != 0)
        change = tl.where(moved, new_value - old_value, 0.0)
        code = tl.where(mine & moved[:, None], new_code[:, None], code)
        value = tl.where(mine & moved[:, None], new_value[:, None], value)
        g -= change[:, None] * tl.load(shares + column, mask=column < count, other=0)[None, :]
    if REFIT:
        q = tl.where(inside, tl.load(levels[:, None] + code) + offset[:, None], 0.0)
        product = tl.zeros_like(q)
        for j in range(count):
            shares = hessian + (first + j).to(tl.int64) * n + first
            mine = tl.sum(tl.where((column == j)[None, :], q, 0.0), 1)
            product += mine[:, None] * tl.load(shares + column, mask=column < count, other=0)[None, :]
        num, den = tl.sum(q * g, 1), tl.sum(product * q, 1)
        # a change below the resolution of a stored scale, 11 bits in float16, is not worth its moves
        worthwhile = (den > 0) & (tl.abs(num) > 0.0009765625 * tl.abs(s) * den) & (s != 0)
        change = tl.where(worthwhile, tl.div_rn(num, tl.where(den > 0, den, 1.0)), 0.0)
        tl.store(scale + row * blocks + block, s + change, mask=exists)
        value += change[:, None] * q
    inside &= exists[:, None]
    tl.store(codes + places, code.to(tl.uint8), mask=inside)
    tl.store(dense + places, value, mask=inside)
    tl.store(moves + row[:, None] * count + column[None, :], value - before, mask=inside)


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
    (rows, n), (begin, end) = work.shape, columns
    errors = torch.empty(rows, end - begin, dtype=torch.float32, device=work.device)
    constants = [t.contiguous() for t in (inverse, order, scale, scale if zero is None else zero, codebook, thresholds)]
    sizes = (rows, n, scale.shape[1], begin, end - begin)
    with on_device(work):
        _feedback[(triton.cdiv(rows, _ROWS),)](
            work,
            *constants,
            middle_of(codebook),
            codes,
            dense,
            errors,
            *sizes,
            BITS=bits_of(codebook),
            BLOCK=block_size,
            HAS_ZERO=zero is not None,
            BY_ROW=codebook.dim() == 2,
            ROWS=_ROWS,
            K=triton.next_power_of_2(end - begin),
            **EXACT,
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
    (rows, n), blocks = gradient.shape, scale.shape[1]
    hessian = hessian.contiguous()
    constants = [t.contiguous() for t in (scale if zero is None else zero, codebook, thresholds)]
    flags = {
        "HAS_ZERO": zero is not None,
        "BY_ROW": codebook.dim() == 2,
        "REFIT": refit,
        "BITS": bits_of(codebook),
        **EXACT,
    }
    for block in [*range(blocks)] * sweeps:
        first, last = block * block_size, min((block + 1) * block_size, n)
        moves = torch.empty(rows, last - first, dtype=torch.float32, device=gradient.device)
        sizes = (rows, n, blocks, block, last - first)
        with on_device(gradient):
            _descend[(triton.cdiv(rows, _ROWS),)](
                gradient, hessian, scale, *constants, codes, dense, moves, *sizes, BLOCK=block_size, ROWS=_ROWS, **flags
            )
        gradient.addmm_(moves, hessian[first:last], alpha=-1)


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
    """On the CPU: every code waits for the one before, in all rows, which leaves a GPU nothing to do side by side."""
    changed = [scale.cpu(), codes.cpu(), dense.cpu()]
    points = None if zero is None else zero.cpu()
    error, hessian, coupling, codebook, thresholds = (t.cpu() for t in (error, hessian, coupling, codebook, thresholds))
    constants = (points, codebook, thresholds, block_size)
    cpu.descend_coupled(error, hessian, coupling, changed[0], *constants, changed[1], changed[2], refit)
    for target, result in zip((scale, codes, dense), changed, strict=True):
        target.copy_(result)
