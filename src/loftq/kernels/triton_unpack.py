"""Triton kernels between packed codes and one number an element: dequantize, unpack, pack."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loftq.kernels.reference import packed_row_bytes
from loftq.kernels.triton_codes import load_codes, load_values
from loftq.kernels.triton_launch import EXACT, handed_over, on_device, tuned, units_of

_TILES = [
    triton.Config({"ROWS": rows, "K": k}, num_warps=warps)
    for rows, k, warps in ((4, 256, 4), (1, 1024, 4), (2, 1024, 4), (4, 1024, 8), (8, 512, 8), (16, 128, 4))
]


@tuned(_TILES, ["rows", "n", "BITS"])
@triton.jit
def _dequantize(
    units,
    scale,
    zero,
    codebook,
    out,
    rows,
    n,
    length,
    blocks,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BY_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * K
    values = load_values(
        units,
        scale,
        zero,
        codebook,
        tl.minimum(row, rows - 1),
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
    column = first + tl.arange(0, K // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = (row < rows)[:, None, None] & (column < n)[None, :, :]
    tl.store(out + (row[:, None, None] * n + column[None, :, :]), values.to(out.dtype.element_ty), mask=inside)


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
        out = torch.empty(packed.shape[0], in_features, dtype=dtype, device=packed.device)
    if out.numel() == 0:
        return out
    m = handed_over(packed, scale, codebook, zero, bits, block_size)
    rows = packed.shape[0]
    with on_device(out):
        # no fused multiply-add: (level + zero * step) * scale rounds as it does on the CPU
        _dequantize(
            lambda meta: (triton.cdiv(rows, meta["ROWS"]), triton.cdiv(in_features, meta["K"])),
            *m.operands,
            out,
            rows,
            in_features,
            *m.sizes,
            **m.constants,
            **EXACT,
        )
    return out


@triton.jit
def _unpack(
    units, codes, rows, n, length, BITS: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * K
    found = load_codes(units, tl.minimum(row, rows - 1) * length, first, length, BITS, ALIGNED, K // 8, False)
    column = first + tl.arange(0, K // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = (row < rows)[:, None, None] & (column < n)[None, :, :]
    tl.store(codes + (row[:, None, None] * n + column[None, :, :]), found.to(tl.uint8), mask=inside)


def unpack(packed: Tensor, bits: int, in_features: int) -> Tensor:
    codes = torch.empty(packed.shape[0], in_features, dtype=torch.uint8, device=packed.device)
    if codes.numel():
        units, aligned = units_of(packed, bits)
        rows, length = units.shape
        grid = (triton.cdiv(rows, 4), triton.cdiv(in_features, 256))
        with on_device(codes):
            _unpack[grid](units, codes, rows, in_features, length, BITS=bits, ALIGNED=aligned, ROWS=4, K=256, **EXACT)
    return codes


@triton.jit
def _pack(codes, packed, rows, n, length, BITS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Eight codes at a time, which fill ``BITS`` whole bytes."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None, :]
    lane = tl.arange(0, 8)[None, None, :]
    column = group[:, :, None] * 8 + lane
    inside = (row < rows)[:, :, None] & (column < n)
    code = tl.load(codes + (row[:, :, None] * n + column), mask=inside, other=0).to(tl.int32)
    word = tl.sum(code << (lane * BITS), 2)  # of codes that share no bit: the sum is their union
    for k in tl.static_range(BITS):
        at = group * BITS + k
        tl.store(
            packed + (row * length + at), ((word >> (8 * k)) & 255).to(tl.uint8), mask=(row < rows) & (at < length)
        )


def pack(codes: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return codes.clone()
    rows, n = codes.shape
    packed = torch.empty(rows, packed_row_bytes(n, bits), dtype=torch.uint8, device=codes.device)
    if codes.numel():
        grid = (triton.cdiv(rows, 4), triton.cdiv(n, 8 * 64))
        with on_device(codes):
            _pack[grid](codes.contiguous(), packed, rows, n, packed.shape[1], BITS=bits, ROWS=4, GROUPS=64, **EXACT)
    return packed
