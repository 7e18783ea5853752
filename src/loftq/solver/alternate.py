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

import torch
from torch import Tensor

from loftq.codec import QuantizedTensor
from loftq.codec.blockwise import check_weight, comfortable_gain, divided, quantize_checked
from loftq.codec.qtensor import stored_levels
from loftq.config import SVDS, QuantSpec, check_alpha, check_damping, one_of, positive_int
from loftq.errors import ConfigError
from loftq.solver.errorfeedback import round_with_feedback
from loftq.solver.importance import InputStatistics, Metric
from loftq.solver.lowrank import truncated_svd
from loftq.solver.methods import METHODS, Method, method_named


@dataclass(frozen=True)
class Decomposition:
    """``W ≈ quantized.dequantize() + scaling * lora_B @ lora_A``.

    Attributes:
        quantized: the backbone Q (out, in).
        lora_A: (r, in) float32.
        lora_B: (out, r) float32.
        scaling: what LoRA's forward multiplies B A with: alpha / r, or alpha / sqrt(r) with rsLoRA.
        errors: relative Frobenius error |W - Q - scaling * B A| / |W| per step; ``errors[0]`` is plain quantization.
        best_iter: the step that was kept, ``errors[best_iter]`` being its error.
        objectives: what the method minimises, relative to |W P|, per step; equal to ``errors`` for weight-only methods.
        method: what gave the result; for ``auto`` the candidate that won.
    """

    quantized: QuantizedTensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    errors: list[float]
    best_iter: int
    objectives: list[float]
    method: str

    @property
    def error(self) -> float:
        """Relative Frobenius error of the result."""
        return self.errors[self.best_iter]

    @property
    def objective(self) -> float:
        """Relative objective of the result."""
        return self.objectives[self.best_iter]

    def dequantize(self) -> Tensor:
        """The dense Q + scaling * B A (out, in), float32."""
        return torch.addmm(self.quantized.dequantize(), self.lora_B, self.lora_A, alpha=self.scaling)


def lora_scaling(lora_alpha: float | None, rank: int, use_rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732); alpha defaults to r."""
    alpha = rank if lora_alpha is None else lora_alpha
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def decompose(
    weight: Tensor,
    spec: QuantSpec,
    *,
    rank: int,
    num_iter: int = 5,
    method: str | None = None,
    lora_alpha: float | None = None,
    use_rslora: bool = False,
    importance: InputStatistics | Tensor | None = None,
    damping: float | None = None,
    svd: str = "auto",
    seed: int = 0,
) -> Decomposition:
    """Find Q, A and B for one matrix.

    Args:
        weight: (out, in), any floating dtype, any device. Computed in float32.
        spec: how Q is stored.
        rank: r. Beyond min(out, in) the surplus starts as PEFT starts an adapter: A random, B zero.
        num_iter: alternations T; 0 is plain quantization with PEFT's default adapter.
        method: a name of :data:`loftq.solver.methods.METHODS`; by default ``loftq-data`` with ``importance`` and ``loftq``
            without.
        lora_alpha: LoRA's alpha, ``None`` for the rank. The factors are divided by sqrt(scaling) each, so the layer
            computes the fitted matrix for every alpha.
        use_rslora: scaling alpha / sqrt(r) instead of alpha / r.
        importance: the statistics of the layer's inputs, or their second moment alone: (in, in), or (in,) its diagonal.
            Of a layer that saw no input only the weight error is minimised.
        damping: λ of ``H_λ = (1 - λ) H d / tr(H) + λ I``, 0 to 1; ``None`` for the method's own. 1 is the weight error.
        svd: ``exact``, ``block`` or ``auto``; see :func:`loftq.solver.lowrank.truncated_svd`.
        seed: of the random start of the block power iteration and of A where it is not fitted.

    Raises:
        ConfigError: for a setting out of range, or a method that lacks the statistics it works on.
        WeightError: for a weight with NaN or infinite elements, or that is no matrix, or statistics of another layer.
    """
    positive_int("rank", rank)
    positive_int("num_iter", num_iter, 0)
    positive_int("seed", seed, 0)
    one_of("svd", svd, SVDS)
    check_alpha(lora_alpha)
    check_damping(damping)
    if method is None:
        method = "loftq" if importance is None else "loftq-data"
    chosen = method_named(method)
    check_weight(weight)
    statistics = InputStatistics(importance) if isinstance(importance, Tensor) else importance
    _check_statistics(method, chosen, statistics, weight.shape[1])
    weight = weight.detach().float().contiguous()
    gain = comfortable_gain(weight)
    weight = divided(weight, gain)
    scaling = lora_scaling(lora_alpha, rank, use_rslora)

    lacking = statistics is not None and statistics.mean_abs is None  # then LQER is no candidate
    names = tuple(n for n in chosen.candidates if not (lacking and METHODS[n].metric == "mean-abs")) or (method,)
    goal = _metric(chosen, statistics, damping)
    found = []
    for name in names:
        candidate = METHODS[name]
        steps = num_iter if candidate.steps is None else min(candidate.steps, num_iter)
        metric = goal if name == method else _metric(candidate, statistics, damping)
        search = _Search(weight, spec, min(rank, *weight.shape), candidate, metric, svd, seed)
        found.append(search.run(steps))
    if chosen.candidates:
        judge = _Search(weight, spec, rank, chosen, goal, svd, seed)
        scores = [judge.objective(s.dense(weight)) for s in found]
        best = min(range(len(found)), key=scores.__getitem__)
        found[best].objectives[found[best].best_iter] = scores[best]
        names, found = (names[best],), [found[best]]
    (result,) = found
    lora_A, lora_B = _factors(result.lowrank, weight, rank, scaling / gain, seed)
    return Decomposition(
        result.quantized.times(gain),
        lora_A,
        lora_B,
        scaling,
        result.errors,
        result.best_iter,
        result.objectives,
        names[0],
    )


def _check_statistics(name: str, method: Method, statistics: InputStatistics | None, in_features: int) -> None:
    if statistics is not None:
        statistics.check(in_features)
    if not method.needs_inputs:
        return
    if statistics is None:
        raise ConfigError(
            f"method {name!r} works on the layer's inputs, but there are no statistics of them; give a calibration text or "
            f"choose a weight-only method such as 'loftq'"
        )
    if not statistics.informative:
        return
    if method.metric == "mean-abs" and statistics.mean_abs is None:
        raise ConfigError(f"method {name!r} needs E|x|, which these statistics lack; calibrate again")
    if method.needs_gradients and (statistics.fisher_rows is None or statistics.fisher_columns is None):
        raise ConfigError(f"method {name!r} needs gradients, which these statistics lack; calibrate for this method")


def _metric(method: Method, statistics: InputStatistics | None, damping: float | None) -> Metric:
    if statistics is None or method.metric == "none" or not statistics.informative:
        return Metric()
    damping = method.damping if damping is None else damping
    return statistics.metric(method.metric, damping, method.row_damping, method.guidance)


# Levels are refitted in the first roundings only; after them they hardly move, and a refit costs as much as the rest.
_LEVEL_ROUNDS = 2


@dataclass(frozen=True)
class _LowRank:
    """L = left @ right, the whitened subspace to start the next SVD from, and |R P - U S Vh| where it is known."""

    left: Tensor
    right: Tensor
    basis: Tensor | None = None
    remainder: float | None = None


@dataclass
class _Found:
    """The best iterate, and the errors of all."""

    quantized: QuantizedTensor
    lowrank: _LowRank | None
    errors: list[float]
    objectives: list[float]
    best_iter: int = 0

    def dense(self, weight: Tensor) -> Tensor:
        dense = self.quantized.dequantize()
        return dense if self.lowrank is None else (self.lowrank.left @ self.lowrank.right).add_(dense)


class _Search:
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
        self.norm = _norm(weight) or 1.0
        self.whitened_norm = _norm(metric.whiten(weight)) or 1.0

    def run(self, steps: int) -> _Found:
        plain = quantize_checked(self.weight, self.spec, None)
        found = _Found(plain, None, [], [])
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
            # not kept in a variable: it is as large as the weight
            lowrank = self.fit(self.target if svd_first and step == 1 else self.residual(quantized), lowrank)
            if svd_first:
                quantized = self.round(self.without(lowrank), quantized)
            self.record(found, quantized, lowrank, None if svd_first else lowrank.remainder)
        return found

    def preserve(self, kept: int, plain: QuantizedTensor) -> tuple[QuantizedTensor, _LowRank]:
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
        return quantized, _LowRank(torch.cat([p.left for p in parts], 1), torch.cat([p.right for p in parts], 0))

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
                refit_levels=self.rounds <= _LEVEL_ROUNDS,
            )
        # of a diagonal second moment error feedback has nothing to pass on: what remains of it are the columns' weights
        return quantize_checked(target, self.spec, levels, self.metric.columns if self.method.feedback else None)

    def fit(self, residual: Tensor, previous: _LowRank | None, rank: int | None = None) -> _LowRank:
        """SVD_r(R P) P⁻¹."""
        basis = None if previous is None else previous.basis
        whitened = self.metric.whiten(residual)
        found = truncated_svd(whitened, rank or self.rank, method=self.svd, basis=basis, seed=self.seed)
        root = found.S.sqrt()
        left = self.metric.unwhiten_rows(found.U * root)
        right = self.metric.unwhiten_columns(root[:, None] * found.Vh)
        if self.method.half_adapter:
            return _LowRank(left.half().float(), right.half().float(), found.basis)
        # U S Vh is a projection of R P, exactly, so the squares subtract, unless too little is left for float32
        total = _norm(whitened) ** 2
        rest = total - found.energy
        return _LowRank(left, right, found.basis, math.sqrt(rest) if rest > 1e-4 * total else None)

    def residual(self, quantized: QuantizedTensor) -> Tensor:
        """What the low-rank part is fitted to: the target without Q."""
        dense = quantized.dequantize()
        return torch.sub(self.target, dense, out=dense)

    def without(self, lowrank: _LowRank) -> Tensor:
        """What is left to quantize: the target without L."""
        return torch.addmm(self.target, lowrank.left, lowrank.right, alpha=-1)

    def objective(self, dense: Tensor) -> float:
        return _norm(self.metric.whiten(self.target - dense)) / self.whitened_norm

    def record(
        self, found: _Found, quantized: QuantizedTensor, lowrank: _LowRank | None, remainder: float | None = None
    ) -> None:
        """Add an iterate's errors, and keep it if it is the best so far; its objective may be known already."""
        dense = replace(found, quantized=quantized, lowrank=lowrank).dense(self.weight)
        unweighted = self.metric.factor is None
        error = _norm(torch.sub(self.weight, dense, out=dense if unweighted else None)) / self.norm
        found.errors.append(error)
        if unweighted:
            found.objectives.append(error)
        else:
            found.objectives.append(self.objective(dense) if remainder is None else remainder / self.whitened_norm)
        if found.objectives[-1] < found.objectives[found.best_iter]:
            found.quantized, found.lowrank, found.best_iter = quantized, lowrank, len(found.errors) - 1


def _norm(matrix: Tensor) -> float:
    """Frobenius norm: float32 within a row, float64 across rows."""
    return float(torch.linalg.vector_norm(torch.linalg.vector_norm(matrix, dim=1), dtype=torch.float64))


def _factors(lowrank: _LowRank | None, weight: Tensor, rank: int, scaling: float, seed: int) -> tuple[Tensor, Tensor]:
    """A (r, in), B (out, r) with scaling * B A = L; what L does not fill starts as in PEFT."""
    out_features, in_features = weight.shape
    fitted = 0 if lowrank is None else lowrank.left.shape[1]
    lora_A = torch.empty(rank, in_features)
    lora_B = torch.zeros(out_features, rank, device=weight.device)
    if fitted < rank:
        # PEFT's default: kaiming_uniform with a = sqrt(5), that is uniform in ±1/sqrt(in)
        generator = torch.Generator("cpu").manual_seed(seed)
        lora_A.uniform_(-1 / math.sqrt(in_features), 1 / math.sqrt(in_features), generator=generator)
    lora_A = lora_A.to(weight.device)
    if lowrank is not None:
        left, right = lowrank.left, lowrank.right
        # The split between the factors is free; equal norms give equal learning rates equal meaning, whatever P was.
        ratio = torch.linalg.vector_norm(right, dim=1) / torch.linalg.vector_norm(left, dim=0)
        share = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1.0).sqrt()
        lora_A[:fitted] = right / (share * math.sqrt(scaling))[:, None]
        lora_B[:, :fitted] = left * (share / math.sqrt(scaling))
    return lora_A, lora_B
