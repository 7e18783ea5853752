"""One matrix -> a quantized backbone and a LoRA pair that together are close to it.

    minimise |(W - Q - L) P|_F   over Q representable by the spec and L = scaling * B A of rank r,   H_λ = P Pᵀ

    quantization first:  Q <- quantize(W - L; H_λ);    L <- SVD_r((W - Q) P) P⁻¹
    SVD first:           L <- SVD_r((W - Q) P) P⁻¹;    Q <- quantize(W - L; H_λ)

With P = I this is LoftQ (Algorithm 1, arXiv 2310.08659); H is the second moment of the layer's inputs, see
:mod:`loftq.solver.importance`. Which quantizer, which P and how many steps is what tells the named methods apart:
:mod:`loftq.solver.methods`. The published loop returns its last iterate, which need not be its best. Here the iterate with
the smallest objective is returned, plain quantization (L = 0) being iterate 0, so the result is never worse than that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from loftq.codec import QuantizedTensor
from loftq.codec.blockwise import quantize_checked
from loftq.codec.qtensor import stored_levels
from loftq.config import QuantSpec
from loftq.solver.errorfeedback import round_with_feedback
from loftq.solver.importance import Metric
from loftq.solver.lowrank import truncated_svd
from loftq.solver.methods import Method

# Levels are refitted in the first roundings only; after them they hardly move, and a refit costs as much as the rest.
LEVEL_ROUNDS = 2


@dataclass(frozen=True)
class Adapter:
    """L = left @ right, the whitened subspace to start the next SVD from, and |R P - U S Vh| where it is known."""

    left: Tensor
    right: Tensor
    basis: Tensor | None = None
    remainder: float | None = None


@dataclass
class Found:
    """The best iterate, and the errors of all."""

    quantized: QuantizedTensor
    lowrank: Adapter | None
    errors: list[float]
    objectives: list[float]
    best_iter: int = 0

    def dense(self, memory: Tensor | None = None) -> Tensor:
        dense = self.quantized.dequantize(out=memory)
        return dense if self.lowrank is None else dense.addmm_(self.lowrank.left, self.lowrank.right)


class Search:
    """One method's alternation on one matrix."""

    def __init__(
        self, weight: Tensor, spec: QuantSpec, rank: int, method: Method, metric: Metric, svd: str, seed: int
    ) -> None:
        self.weight = weight
        self.spec = spec
        self.rank = rank
        self.method = method
        self.metric = metric
        self.svd = svd
        self.seed = seed
        self.rounds = 0
        self.target = weight
        if method.follow_drift and metric.drift is not None:
            self.target = torch.addmm(weight, weight, metric.drift)
        self.norm = norm(weight) or 1.0
        self.whitened_norm = norm(metric.whiten(weight)) or 1.0

    @cached_property
    def memory(self) -> Tensor:
        """For what every step computes of the weight's size: a fresh large tensor costs more than what is written to it."""
        return torch.empty_like(self.weight)

    def run(self, steps: int) -> Found:
        plain = quantize_checked(self.weight, self.spec, None)
        found = Found(plain, None, [], [])
        self.record(found, plain, None)
        if steps and self.method.preserve:
            for kept in sorted({0, self.rank // 4, self.rank // 2, 3 * self.rank // 4, self.rank}):
                self.record(found, *self.preserve(kept, plain))
            return found
        quantized, lowrank = plain, None
        if steps and self.method.principal_start:
            lowrank = self.fit(self.target, None)
            quantized = self.round(self.without(lowrank), None)
        elif self.method.feedback:
            quantized = self.round(self.target, None)
        if steps == 0 and self.method.feedback:
            self.record(found, quantized, None)
        svd_first = self.method.svd_first
        for step in range(1, steps + 1):
            if lowrank is not None and step > 1 and not svd_first:
                quantized = self.round(self.without(lowrank), quantized)
            lowrank = self.fit(self.target if svd_first and step == 1 else self.residual(quantized), lowrank)
            if svd_first:
                quantized = self.round(self.without(lowrank), quantized)
            self.record(found, quantized, lowrank, None if svd_first else lowrank.remainder)
        return found

    def preserve(self, kept: int, plain: QuantizedTensor) -> tuple[QuantizedTensor, Adapter]:
        """The k largest directions of W stay in the adapter; the other r - k correct the error of the rest."""
        parts = []
        quantized = plain
        remainder = self.target
        if kept:
            parts.append(self.fit(self.target, None, kept))
            remainder = self.without(parts[0])
            quantized = self.round(remainder, None)
        if kept < self.rank:
            parts.append(self.fit(remainder - quantized.dequantize(), None, self.rank - kept))
        return quantized, Adapter(torch.cat([p.left for p in parts], 1), torch.cat([p.right for p in parts], 0))

    def round(self, target: Tensor, previous: QuantizedTensor | None) -> QuantizedTensor:
        levels = None if previous is None else stored_levels(previous.tensors)
        if self.method.feedback and self.metric.order is not None:
            self.rounds += 1
            return round_with_feedback(
                target,
                self.spec,
                self.metric,
                levels=levels,
                sweeps=self.method.sweeps,
                refit_levels=self.rounds <= LEVEL_ROUNDS,
            )
        # of a diagonal second moment error feedback has nothing to pass on: what remains of it are the columns' weights
        return quantize_checked(target, self.spec, levels, self.metric.columns if self.method.feedback else None)

    def fit(self, residual: Tensor, previous: Adapter | None, rank: int | None = None) -> Adapter:
        """SVD_r(R P) P⁻¹."""
        basis = None if previous is None else previous.basis
        whitened = self.metric.whiten(residual)
        found = truncated_svd(whitened, rank or self.rank, method=self.svd, basis=basis, seed=self.seed)
        root = found.S.sqrt()
        left = self.metric.unwhiten_rows(found.U * root)
        right = self.metric.unwhiten_columns(root[:, None] * found.Vh)
        if self.method.half_adapter:
            return Adapter(left.half().float(), right.half().float(), found.basis)
        # U S Vh is a projection of R P, exactly, so the squares subtract, unless too little is left for float32
        total = norm(whitened) ** 2
        rest = total - found.energy
        return Adapter(left, right, found.basis, math.sqrt(rest) if rest > 1e-2 * total else None)

    def residual(self, quantized: QuantizedTensor) -> Tensor:
        """What the low-rank part is fitted to: the target without Q, in the search's memory."""
        return torch.sub(self.target, quantized.dequantize(out=self.memory), out=self.memory)

    def without(self, lowrank: Adapter) -> Tensor:
        """What is left to quantize: the target without L, in the search's memory."""
        return torch.addmm(self.target, lowrank.left, lowrank.right, alpha=-1, out=self.memory)

    def objective(self, error: Tensor) -> float:
        """|(M - Q - L) P| relative to |W P| for the error W - Q - L, whose memory is used where the target M is not W."""
        if self.target is not self.weight:
            error += self.target - self.weight
        return norm(self.metric.whiten(error)) / self.whitened_norm

    def record(
        self, found: Found, quantized: QuantizedTensor, lowrank: Adapter | None, remainder: float | None = None
    ) -> None:
        """Add an iterate's errors, and keep it if it is the best so far; its objective may be known already."""
        if self.metric.factor is None and remainder is not None:
            error = objective = remainder / self.norm
        else:
            left = replace(found, quantized=quantized, lowrank=lowrank).dense(self.memory)
            torch.sub(self.weight, left, out=left)
            error = objective = norm(left) / self.norm
            if remainder is not None:
                objective = remainder / self.whitened_norm
            elif self.metric.factor is not None:
                objective = self.objective(left)
        found.errors.append(error)
        found.objectives.append(objective)
        if found.objectives[-1] < found.objectives[found.best_iter]:
            found.quantized, found.lowrank, found.best_iter = quantized, lowrank, len(found.errors) - 1


def norm(matrix: Tensor) -> float:
    """Frobenius norm: float32 within a row, float64 across rows."""
    return float(torch.linalg.vector_norm(torch.linalg.vector_norm(matrix, dim=1), dtype=torch.float64))
