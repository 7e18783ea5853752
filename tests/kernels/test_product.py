"""Products with a packed matrix that is never written out, against float64 products with the dense one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from test_reference import SHAPES, levels_for, random_scales, random_weight, shapes, widths, zeros

import loftq
from loftq import kernels
from loftq.codec.codebook import thresholds
from loftq.kernels import reference

stored = pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=str)


def packed_matrix(rows: int, n: int, block_size: int, bits: int, with_zero: bool, dtype: torch.dtype = torch.float32):
    """What the operators take, and the float64 matrix it stands for."""
    levels = levels_for(bits, with_zero)
    scale, zero = random_scales(rows, n, block_size, with_zero)
    scale, zero = scale.to(dtype), None if zero is None else zero.to(dtype)
    exact = scale.float(), None if zero is None else zero.float()
    codes = kernels.encode(random_weight(rows, n), *exact, levels, thresholds(levels), block_size)
    packed = kernels.pack(codes, bits)
    dense = reference.dequantize(packed, exact[0], levels, exact[1], bits, block_size, n)
    return (packed, scale, levels, zero, bits, block_size), dense.double()


def close(found: torch.Tensor, exact: torch.Tensor, terms: torch.Tensor) -> bool:
    """Within the rounding of a float32 sum of these terms."""
    return bool(((found.double() - exact).abs() <= 1e-6 * terms + 1e-30).all())


@stored
@zeros
@widths
@shapes
def test_product_equals_the_dense_product(rows, n, block_size, bits, with_zero, stored):
    operands, dense = packed_matrix(rows, n, block_size, bits, with_zero, stored)
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(4))
    spread = x.double().abs() @ dense.abs().T
    if with_zero:  # levels and zeros are summed apart
        spread = (
            spread
            + x.double().abs()
            @ (operands[1].double().abs() * (levels_size(operands))).repeat_interleave(block_size, 1)[:, :n].T
        )
    assert close(kernels.product(x, *operands), x.double() @ dense.T, spread)


def levels_size(operands) -> torch.Tensor:
    """Largest size of a level and of a zero point of each block."""
    _, _, levels, zero, *_ = operands
    return levels.abs().max().double() + (zero.double().abs() * levels[1].double())


@stored
@zeros
@widths
@shapes
def test_gradient_equals_the_dense_product(rows, n, block_size, bits, with_zero, stored):
    operands, dense = packed_matrix(rows, n, block_size, bits, with_zero, stored)
    grad = torch.randn(3, rows, generator=torch.Generator().manual_seed(5))
    terms = grad.double().abs() @ dense.abs()
    if with_zero:
        size = (operands[1].double().abs() * levels_size(operands)).repeat_interleave(block_size, 1)[:, :n]
        terms = terms + grad.double().abs() @ size
    assert close(kernels.grad_product(grad, *operands, n), grad.double() @ dense, terms)


@pytest.mark.parametrize("tokens", [5, 17, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@zeros
@widths
@shapes
def test_many_tokens(rows, n, block_size, bits, with_zero, dtype, tokens):
    """Groups of tokens that are full or not, rows and columns that no piece divides: y and the gradient.

    Bfloat16 may be multiplied with the matrix rounded to it, as a dense product would be; the result is rounded once.
    """
    operands, dense = packed_matrix(rows, n, block_size, bits, with_zero)
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(n, tokens, generator=generator).T.to(dtype)  # not contiguous
    grad = torch.randn(tokens, rows, generator=generator).to(dtype)
    for found, factor, matrix in (
        (kernels.product(x, *operands), x, dense.T),
        (kernels.grad_product(grad, *operands, n), grad, dense),
    ):
        exact, terms = factor.double() @ matrix, factor.double().abs() @ matrix.abs()
        result = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        weight_rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
        assert found.dtype == dtype
        assert found.shape == exact.shape
        assert bool(((found.double() - exact).abs() <= weight_rounding * terms + result * exact.abs() + 1e-7).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_does_not_depend_on_the_others(dtype):
    """In a group that is full or not, or among more tokens than are in their own order at once."""
    operands, _ = packed_matrix(*SHAPES["threaded"], 3, with_zero=True)
    x = torch.randn(300, SHAPES["threaded"][1]).to(dtype)
    everything = kernels.product(x, *operands)
    for part in (slice(7), slice(3, 19), slice(3, 36), slice(250, 300)):
        assert torch.equal(kernels.product(x[part], *operands), everything[part])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_token_of_the_last_group_in_a_transposed_input(dtype):
    operands, _ = packed_matrix(*SHAPES["threaded"], 4, with_zero=False)
    x = torch.randn(SHAPES["threaded"][1], kernels.TOKENS_AT_ONCE + 1).to(dtype).T
    assert torch.equal(kernels.product(x, *operands), kernels.product(x.contiguous(), *operands))


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton_kernels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_sums_of_nothing(tokens, dtype, backend):
    if backend == "triton_kernels":
        pytest.importorskip("triton")
    packed, scale, *rest = packed_matrix(2, 64, 32, 4, with_zero=False)[0]
    nothing = (packed[:0], scale[:0], *rest)
    with kernels._only(backend):
        assert kernels.product(torch.ones(tokens, 64, dtype=dtype), *nothing).shape == (tokens, 0)
        grad = kernels.grad_product(torch.ones(tokens, 0, dtype=dtype), *nothing, 64)
    assert torch.equal(grad, torch.zeros(tokens, 64, dtype=dtype))


WITHOUT_NUMBA = """
import sys, warnings
sys.modules["numba"] = None
import torch, loftq
from loftq.evaluate.head import losses
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    found = loftq.decompose(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), loftq.QuantSpec(4), rank=4)
    layer = loftq.QuantLinear.from_linear(torch.nn.Linear(64, 8), loftq.QuantSpec(3))
    layer(torch.randn(2, 64, requires_grad=True)).sum().backward()
assert [str(w.message) for w in said if "numba" in str(w.message)] == [str(said[0].message)], said
assert torch.allclose(losses(torch.zeros(2, 4), torch.tensor([0, 3])), torch.full((2,), 4.0, dtype=torch.float64).log())
print(f"{found.errors[-1]:.6f}")
"""


def test_without_numba_the_reference_takes_over_and_says_so_once():
    done = subprocess.run([sys.executable, "-c", WITHOUT_NUMBA], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    assert float(done.stdout) == pytest.approx(loftq.decompose(weight, loftq.QuantSpec(4), rank=4).errors[-1], rel=1e-4)


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("threads", [1, 2, 3])
@widths
def test_the_result_does_not_depend_on_the_number_of_threads(bits, threads, tokens):
    operands, _ = packed_matrix(*SHAPES["threaded"], bits, with_zero=True)
    x, grad = torch.randn(tokens, SHAPES["threaded"][1]), torch.randn(tokens, SHAPES["threaded"][0])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = kernels.product(x, *operands), kernels.grad_product(grad, *operands, SHAPES["threaded"][1])
        torch.set_num_threads(threads)
        found = kernels.product(x, *operands), kernels.grad_product(grad, *operands, SHAPES["threaded"][1])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, alone, found))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@zeros
@widths
@shapes
def test_half_precision_values_are_the_float32_ones_rounded(rows, n, block_size, bits, with_zero, dtype):
    operands, dense = packed_matrix(rows, n, block_size, bits, with_zero)
    found = kernels.dequantize(*operands, n, dtype)
    assert torch.equal(found, dense.float().to(dtype))
    into = torch.empty(rows, n, dtype=dtype)
    assert kernels.dequantize(*operands, n, dtype, out=into) is into
    assert torch.equal(found, into)
