"""Random instances of rounding under a second moment, for the tests of error feedback and coordinate descent."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loftq import kernels
from loftq.codec.codebook import codebook, thresholds
from loftq.kernels import reference


class Problem(NamedTuple):
    """A matrix, the second moment of its inputs, and scales, one of them 0."""

    weight: Tensor
    hessian: Tensor
    inverse: Tensor  # P⁻¹, upper triangular, for the permuted second moment P Pᵀ
    order: Tensor
    scale: Tensor
    zero: Tensor | None
    levels: Tensor

    def value(self, codes: Tensor, scale: Tensor, block_size: int) -> Tensor:
        """Float64 values of codes."""
        spread = scale.double().repeat_interleave(block_size, 1)[:, : codes.shape[1]]
        value = self.levels.double()[codes.long()]
        if self.zero is not None:
            zero = self.zero.double().repeat_interleave(block_size, 1)[:, : codes.shape[1]]
            value = value + zero * self.levels[1]
        return spread * value

    def costs(self, dense: Tensor) -> Tensor:
        """(rows,) (w - q) H (w - q)ᵀ, float64."""
        error = self.weight.double() - dense.double()
        return ((error @ self.hessian.double()) * error).sum(1)


def problem(rows: int, n: int, block_size: int, name: str, bits: int) -> Problem:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(rows, n, generator=generator)
    mixed = torch.randn(4 * n, n, generator=generator) @ (torch.eye(n) + 0.3 * torch.randn(n, n, generator=generator))
    hessian = (mixed.double().T @ mixed.double()) / (4 * n) + 0.1 * torch.eye(n, dtype=torch.float64)
    hessian /= hessian.diagonal().mean()
    order = torch.randperm(n, generator=generator)
    reversed_ = order.flip(0)
    factor = torch.linalg.cholesky(hessian[reversed_][:, reversed_]).flip(0, 1)
    blocks = -(-n // block_size)
    scale = 2.5 * (1 + 0.2 * torch.randn(rows, blocks, generator=generator))
    zero = None
    if name == "uniform":
        scale *= 2 / (2**bits - 1)
        zero = -(2**bits) / 2 + torch.randn(rows, blocks, generator=generator)
    elif name in ("nf", "lloyd"):
        scale[::2] *= -1
    if rows > 1:
        scale[rows // 2, blocks // 2] = 0
    return Problem(
        weight, hessian.float(), factor.inverse().float().contiguous(), order, scale, zero, codebook(name, bits)
    )


def in_double(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(t.double() if t is not None and t.is_floating_point() else t for t in tensors)


class State(NamedTuple):
    gradient: Tensor
    scale: Tensor
    codes: Tensor
    dense: Tensor


def start(p: Problem, block_size: int) -> State:
    """The nearest codes, ignoring H."""
    codes = kernels.encode(p.weight, p.scale, p.zero, p.levels, thresholds(p.levels), block_size)
    dense = p.value(codes, p.scale, block_size).float()
    return State(((p.weight - dense) @ p.hessian).contiguous(), p.scale.clone(), codes, dense)


def descended(p: Problem, block_size: int, sweeps: int, refit: bool, double: bool = False) -> State:
    state = start(p, block_size)
    gradient, scale, codes, dense = in_double(state) if double else state
    hessian, zero, levels = in_double((p.hessian, p.zero, p.levels)) if double else (p.hessian, p.zero, p.levels)
    function = reference.descend if double else kernels.descend
    constants = (zero, levels, thresholds(levels), block_size)
    function(gradient, hessian, scale, *constants, codes, dense, sweeps, refit)
    return State(gradient, scale, codes, dense)
