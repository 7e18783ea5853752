"""Triton kernels that choose codes and scales block by block, and the sums that levels are fitted from.

Each program holds a tile of (blocks, elements of a block). See :mod:`loftq.kernels.cpu_fit` for the mathematics; divisions
are rounded correctly, so that a code does not depend on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loftq.kernels.triton_codes import nearest
from loftq.kernels.triton_launch import EXACT, on_device

_TILE = 1024  # elements of a program's tile


@triton.jit
def _place(total, blocks, n, P: tl.constexpr, BLOCK: tl.constexpr):
    """Which blocks a program holds: numbers of the blocks, their rows, columns (P, BLOCK), which of these exist."""
    number = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    held = tl.minimum(number, total - 1)
    row = held // blocks
    column = (held % blocks)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    return number, held, row, column, column < n


@triton.jit
def _encode(
    weight,
    scale,
    zero,
    codebook,
    borders,
    middle,
    codes,
    total,
    blocks,
    n,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BY_ROW: tl.constexpr,
    P: tl.constexpr,
):
    number, held, row, column, inside = _place(total, blocks, n, P, BLOCK)
    at = row[:, None] * n + column
    own = row if BY_ROW else tl.zeros_like(row)
    s = tl.load(scale + held)
    x = tl.div_rn(tl.load(weight + at, mask=inside, other=0), tl.where(s == 0, 1.0, s)[:, None])
    if HAS_ZERO:
        x -= (tl.load(zero + held) * tl.load(codebook + own * (1 << BITS) + 1))[:, None]
    code = nearest(x, borders + (own * ((1 << BITS) - 1))[:, None], BITS)
    code = tl.where((s == 0)[:, None], tl.load(middle + own)[:, None], code)
    tl.store(codes + at, code.to(tl.uint8), mask=inside & (number < total)[:, None])


@triton.jit
def _moments(w, inverse, counts, levels, borders, BITS: tl.constexpr):
    """<e, q>, <q, q> and <e, e> for the levels q nearest to ``w * inverse`` and the rest e, weighted by the counts."""
    scaled = w * inverse[:, None]
    q = tl.load(levels + nearest(scaled, borders, BITS))
    rest = scaled - q
    weighted = q * counts
    return tl.sum(rest * weighted, 1), tl.sum(q * weighted, 1), tl.sum(rest * rest * counts, 1)


@triton.jit
def _search_scale(
    weight,
    counts,
    codebook,
    thresholds,
    factors,
    scale,
    total,
    blocks,
    n,
    candidates,
    refine,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BY_ROW: tl.constexpr,
    P: tl.constexpr,
):
    number, _, row, column, inside = _place(total, blocks, n, P, BLOCK)
    w = tl.load(weight + row[:, None] * n + column, mask=inside, other=0)
    h = tl.load(counts + column, mask=inside, other=0)
    own = row if BY_ROW else tl.zeros_like(row)
    levels = codebook + own * (1 << BITS)
    top = tl.maximum(tl.abs(tl.load(levels)), tl.abs(tl.load(levels + ((1 << BITS) - 1))))
    levels = levels[:, None]
    borders = (thresholds + own * ((1 << BITS) - 1))[:, None]
    start = tl.div_rn(tl.max(tl.abs(w), 1), top)
    tiny = start < 7.888609052210118e-31  # 2^-100, see reference.TINY
    best = start
    score = tl.full((P,), float("inf"), tl.float32)
    for f in range(candidates):
        factor = tl.load(factors + f)
        candidate = start * factor
        num, den, error = _moments(w, tl.div_rn(1.0, tl.where(tiny, 1.0, candidate)), h, levels, borders, BITS)
        step = tl.div_rn(num, tl.where(den > 0, den, 1.0))
        left = factor * factor * (error - step * num)
        better = (den > 0) & (left < score)
        score = tl.where(better, left, score)
        best = tl.where(better, candidate * (1 + step), best)
    for _ in range(refine):
        num, den, error = _moments(w, tl.div_rn(1.0, tl.where(tiny | (best == 0), 1.0, best)), h, levels, borders, BITS)
        step = tl.div_rn(num, tl.where(den > 0, den, 1.0))
        best = tl.where((den > 0) & (best != 0), best * (1 + step), best)
    tl.store(scale + number, tl.where(tiny, start, best), mask=number < total)


@triton.jit
def _affine(w, slope, offset, counts, count, codebook, thresholds, BITS: tl.constexpr):
    """Least squares of the block on (levels, 1): slope, intercept, explained energy about the mean."""
    x = (w - offset[:, None]) * tl.div_rn(1.0, slope)[:, None]
    q = tl.load(codebook + nearest(x, thresholds + tl.zeros_like(offset).to(tl.int32)[:, None], BITS))
    mean_level, mean = tl.div_rn(tl.sum(q * counts, 1), count), tl.div_rn(tl.sum(w * counts, 1), count)
    centred = q - mean_level[:, None]
    num = tl.sum((w - mean[:, None]) * centred * counts, 1)
    den = tl.sum(centred * centred * counts, 1)
    fitted = tl.where(den > 0, tl.div_rn(num, tl.where(den > 0, den, 1.0)), 0.0)
    return fitted, mean - fitted * mean_level, num * fitted


@triton.jit
def _search_affine(
    weight,
    counts,
    codebook,
    thresholds,
    factors,
    scale,
    zero,
    total,
    blocks,
    n,
    candidates,
    refine,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    P: tl.constexpr,
):
    number, _, row, column, inside = _place(total, blocks, n, P, BLOCK)
    w = tl.load(weight + row[:, None] * n + column, mask=inside, other=0)
    h = tl.load(counts + column, mask=inside, other=0)
    count = tl.sum(h, 1)
    low = tl.min(tl.where(inside, w, float("inf")), 1)
    high = tl.max(tl.where(inside, w, float("-inf")), 1)
    constant = high == low
    middle = (high + low) * 0.5
    step = tl.load(codebook + 1)
    span = tl.load(codebook + ((1 << BITS) - 1))
    slope, offset = tl.zeros_like(middle), middle
    score = tl.full((P,), -1.0, tl.float32)
    for f in range(candidates):
        start = tl.div_rn((high - low) * tl.load(factors + f), span)
        start = tl.where(constant, 1.0, start)
        s, o, explained = _affine(w, start, middle - start * span * 0.5, h, count, codebook, thresholds, BITS)
        better = (s > 0) & (explained > score)
        slope, offset = tl.where(better, s, slope), tl.where(better, o, offset)
        score = tl.where(better, explained, score)
    for _ in range(refine):
        held_slope = tl.where(slope > 0, slope, 1.0)
        s, o, explained = _affine(w, held_slope, offset, h, count, codebook, thresholds, BITS)
        better = (s > 0) & (explained >= score) & (slope > 0)
        slope, offset = tl.where(better, s, slope), tl.where(better, o, offset)
        score = tl.where(better, explained, score)
    constant |= slope == 0  # or too close to it for float32 to tell levels apart
    sign = tl.where(middle > 0, 1.0, tl.where(middle < 0, -1.0, 0.0))
    size = tl.where(constant, tl.div_rn(tl.abs(middle), step), slope)
    point = tl.where(constant, sign, tl.div_rn(offset, tl.where(constant, 1.0, slope * step)))
    tl.store(scale + number, size, mask=number < total)
    tl.store(zero + number, point, mask=number < total)


@triton.jit
def _level_moments(
    weight, counts, scale, codes, num, den, n, blocks, BLOCK: tl.constexpr, LEVELS: tl.constexpr, K: tl.constexpr
):
    """Of one row: float64 sums by level, of a tile of (elements, levels) at a time."""
    row = tl.program_id(0).to(tl.int64)
    level = tl.arange(0, LEVELS)
    total_num = tl.zeros((LEVELS,), tl.float64)
    total_den = tl.zeros((LEVELS,), tl.float64)
    for first in range(0, n, K):
        column = first + tl.arange(0, K)
        inside = column < n
        s = tl.load(scale + row * blocks + column // BLOCK, mask=inside, other=0).to(tl.float64)
        weighted = s * tl.load(counts + column, mask=inside, other=0).to(tl.float64)
        w = tl.load(weight + row * n + column, mask=inside, other=0).to(tl.float64)
        code = tl.load(codes + row * n + column, mask=inside, other=0).to(tl.int32)
        mine = code[:, None] == level[None, :]
        total_num += tl.sum(tl.where(mine, (weighted * w)[:, None], 0.0), 0)
        total_den += tl.sum(tl.where(mine, (weighted * s)[:, None], 0.0), 0)
    tl.store(num + row * LEVELS + level, total_num)
    tl.store(den + row * LEVELS + level, total_den)


def _tiles(weight: Tensor, block_size: int) -> tuple[int, int, int, tuple[int]]:
    """Blocks of all rows, blocks of a row, blocks of a program, programs."""
    blocks = triton.cdiv(weight.shape[1], block_size)
    total, held = weight.shape[0] * blocks, max(1, _TILE // block_size)
    return total, blocks, held, (triton.cdiv(total, held),)


def middle_of(codebook: Tensor) -> Tensor:
    """Code of the level nearest to 0, the lower of two: (1,), or (rows,)."""
    return codebook.abs().argmin(-1).view(-1).to(torch.int32)


def encode(
    weight: Tensor, scale: Tensor, zero: Tensor | None, codebook: Tensor, thresholds: Tensor, block_size: int
) -> Tensor:
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    total, blocks, held, grid = _tiles(weight, block_size)
    constants = {"BITS": bits_of(codebook), "BLOCK": block_size, "HAS_ZERO": zero is not None}
    operands = [t.contiguous() for t in (weight, scale, scale if zero is None else zero, codebook, thresholds)]
    with on_device(weight):
        _encode[grid](
            *operands,
            middle_of(codebook),
            codes,
            total,
            blocks,
            weight.shape[1],
            **constants,
            BY_ROW=codebook.dim() == 2,
            P=held,
            **EXACT,
        )
    return codes


def bits_of(codebook: Tensor) -> int:
    """The width of its codes."""
    return codebook.shape[-1].bit_length() - 1


def search_scale(
    weight: Tensor,
    importance: Tensor,
    codebook: Tensor,
    thresholds: Tensor,
    factors: Tensor,
    refine: int,
    block_size: int,
) -> Tensor:
    total, blocks, held, grid = _tiles(weight, block_size)
    scale = torch.empty(weight.shape[0], blocks, dtype=torch.float32, device=weight.device)
    operands = [t.contiguous() for t in (weight, importance, codebook, thresholds, factors)]
    sizes = (total, blocks, weight.shape[1], factors.numel(), refine)
    with on_device(weight):
        _search_scale[grid](
            *operands,
            scale,
            *sizes,
            BITS=bits_of(codebook),
            BLOCK=block_size,
            BY_ROW=codebook.dim() == 2,
            P=held,
            **EXACT,
        )
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
    total, blocks, held, grid = _tiles(weight, block_size)
    scale = torch.empty(weight.shape[0], blocks, dtype=torch.float32, device=weight.device)
    zero = torch.empty_like(scale)
    operands = [t.contiguous() for t in (weight, importance, codebook, thresholds, factors)]
    sizes = (total, blocks, weight.shape[1], factors.numel(), refine)
    with on_device(weight):
        _search_affine[grid](*operands, scale, zero, *sizes, BITS=bits_of(codebook), BLOCK=block_size, P=held, **EXACT)
    return scale, zero


def level_moments(
    weight: Tensor, importance: Tensor, scale: Tensor, codes: Tensor, levels: int, block_size: int, by_row: bool = False
) -> tuple[Tensor, Tensor]:
    rows, n = weight.shape
    num = torch.empty(rows, levels, dtype=torch.float64, device=weight.device)
    den = torch.empty_like(num)
    operands = [t.contiguous() for t in (weight, importance, scale, codes)]
    with on_device(weight):
        _level_moments[(rows,)](
            *operands, num, den, n, scale.shape[1], BLOCK=block_size, LEVELS=levels, K=max(16, 2048 // levels), **EXACT
        )
    return (num, den) if by_row else (num.sum(0), den.sum(0))
