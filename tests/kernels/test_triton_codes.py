"""Triton kernels that read and write packed codes, against their definition."""

from __future__ import annotations

import pytest
import torch
from test_levels_by_row import levels_by_row
from test_product import close, levels_size, packed_matrix
from test_reference import levels_for, random_scales
from triton_side import DEVICE, INTERPRETED, by_triton, rounded

pytest.importorskip("triton", reason="needs Triton: pip install loftq[triton]")

from loftq import kernels
from loftq.config import BITS
from loftq.kernels import reference

# Rows of whole units and several tiles; rows that start anywhere and end in the middle of everything; large blocks.
SHAPES = {"whole": (5, 320, 64), "ragged": (7, 131, 32), "large-blocks": (4, 300, 256), "short-block": (3, 37, 128)}
shapes = pytest.mark.parametrize(("rows", "n", "block_size"), SHAPES.values(), ids=SHAPES)
widths = pytest.mark.parametrize("bits", BITS, ids=lambda bits: f"{bits}bit")


def random_codes(rows: int, n: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, (rows, n), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@shapes
@widths
def test_pack_and_unpack(bits, rows, n, block_size):
    codes = random_codes(rows, n, bits)
    packed = by_triton(kernels.pack, codes, bits)
    assert torch.equal(packed, reference.pack(codes, bits))
    assert torch.equal(by_triton(kernels.unpack, packed, bits, n), codes)


@pytest.mark.parametrize("with_zero", [False, True], ids=["scale", "scale+zero"])
@shapes
@widths
def test_dequantize(bits, rows, n, block_size, with_zero):
    scale, zero = random_scales(rows, n, block_size, with_zero)
    stored = scale.half(), levels_for(bits, with_zero), None if zero is None else zero.half()
    args = (reference.pack(random_codes(rows, n, bits), bits), *stored, bits, block_size, n)
    exact = reference.dequantize(*args)
    assert torch.equal(by_triton(kernels.dequantize, *args), exact)
    dtype = torch.bfloat16 if with_zero else torch.float16
    assert torch.equal(by_triton(kernels.dequantize, *args, dtype), rounded(exact, dtype))


@widths
def test_levels_of_each_rows_own(bits):
    levels = levels_by_row(bits).bfloat16()
    rows, n, block_size = levels.shape[0], 83, 32
    scale, _ = random_scales(rows, n, block_size, False)
    operands = (reference.pack(random_codes(rows, n, bits), bits), scale, levels, None, bits, block_size)
    exact = reference.dequantize(*operands, n)
    assert torch.equal(by_triton(kernels.dequantize, *operands, n), exact)
    x = torch.randn(1, n, generator=torch.Generator().manual_seed(4))
    found = by_triton(kernels.product, x, *operands)
    assert close(found, x.double() @ exact.double().T, x.double().abs() @ exact.double().abs().T)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("with_zero", [False, True], ids=["scale", "scale+zero"])
@shapes
@widths
def test_product_equals_the_dense_product(rows, n, block_size, bits, with_zero, tokens):
    operands, dense = packed_matrix(rows, n, block_size, bits, with_zero, torch.float16)
    x = torch.randn(tokens, n, generator=torch.Generator().manual_seed(4))
    terms = x.double().abs() @ dense.abs().T
    if with_zero:
        size = (operands[1].double().abs() * levels_size(operands)).repeat_interleave(block_size, 1)[:, :n]
        terms = terms + x.double().abs() @ size.T
    assert close(by_triton(kernels.product, x, *operands), x.double() @ dense.T, terms)


@pytest.mark.parametrize("with_zero", [False, True], ids=["scale", "scale+zero"])
@shapes
@widths
def test_gradient_equals_the_dense_product(rows, n, block_size, bits, with_zero):
    operands, dense = packed_matrix(rows, n, block_size, bits, with_zero)
    grad = torch.randn(3, rows, generator=torch.Generator().manual_seed(5))
    found = by_triton(kernels.grad_product, grad, *operands, n)
    size = (operands[1].double().abs() * levels_size(operands) if with_zero else operands[1].double().abs()).float()
    terms = grad.double().abs() @ size.double().repeat_interleave(block_size, 1)[:, :n] * (1 if with_zero else 2**8)
    assert close(found, grad.double() @ dense, terms)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 17])
def test_products_in_half_precision(tokens, dtype):
    """Several tokens are multiplied with W rounded to their dtype; 17 are more than a tile takes."""
    if INTERPRETED and dtype == torch.bfloat16 and tokens > 1:
        pytest.skip("needs a GPU: Triton's interpreter multiplies matrices of bfloat16 as if their bits were integers")
    operands, dense = packed_matrix(5, 131, 32, 4, False)
    x = torch.randn(tokens, 131, generator=torch.Generator().manual_seed(4)).to(dtype)
    found = by_triton(kernels.product, x, *operands)
    assert found.dtype == dtype
    terms = x.double().abs() @ dense.abs().T
    # the result is rounded (or cut off), and with several tokens each value of W too
    difference = (found.double() - x.double() @ dense.T).abs()
    assert bool((difference <= 3 * torch.finfo(dtype).eps * terms).all()), float((difference / terms).max())


@widths
def test_gradient_in_half_precision(bits):
    """In float16: bfloat16 is beyond the interpreter's matrix product."""
    operands, dense = packed_matrix(7, 131, 32, bits, False)
    grad = torch.randn(3, 7, generator=torch.Generator().manual_seed(5)).half()
    found = by_triton(kernels.grad_product, grad, *operands, 131)
    assert found.dtype == torch.float16
    terms = grad.double().abs() @ dense.abs()
    assert bool(((found.double() - grad.double() @ dense).abs() <= 3 * torch.finfo(torch.float16).eps * terms).all())


def test_a_sum_in_parts_gives_the_same_bits_twice():
    operands, dense = packed_matrix(3, 515, 64, 4, False)
    x = torch.randn(2, 515, generator=torch.Generator().manual_seed(4))
    first, second = (by_triton(kernels.product, x, *operands) for _ in range(2))
    assert torch.equal(first, second)
    assert close(first, x.double() @ dense.T, x.double().abs() @ dense.abs().T)


def test_memory_that_starts_anywhere():
    """A slice of packed bytes, and of levels, that starts where no whole unit does."""
    operands, dense = packed_matrix(4, 64, 32, 4, False)
    packed, scale, levels, *rest = (t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in operands)
    shifted = torch.empty(packed.numel() + 1, dtype=torch.uint8, device=DEVICE)[1:].view(packed.shape).copy_(packed)
    apart = torch.empty(levels.numel() + 1, device=DEVICE)[1:].copy_(levels)
    with kernels._only("triton_kernels"):
        found = kernels.dequantize(shifted, scale, apart, *rest, 64)
    assert torch.equal(found.cpu().double(), dense)


def test_no_rows_and_no_tokens():
    packed, scale, levels = torch.empty(0, 16, dtype=torch.uint8), torch.empty(0, 1), levels_for(4, False)
    assert by_triton(kernels.dequantize, packed, scale, levels, None, 4, 32, 32).shape == (0, 32)
    operands, _ = packed_matrix(4, 64, 32, 4, False)
    assert by_triton(kernels.product, torch.empty(0, 64), *operands).shape == (0, 4)
