"""What a caller sees of the solver: one matrix, a spec and a method's name in; Q and the LoRA pair out.

The alternation itself is :mod:`loftq.solver.alternate`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loftq.codec import QuantizedTensor
from loftq.codec.blockwise import check_weight, comfortable_gain, divided
from loftq.config import SVDS, QuantSpec, check_alpha, check_damping, default_method, one_of, positive_int
from loftq.errors import ConfigError
from loftq.solver.alternate import Adapter, Search
from loftq.solver.importance import InputStatistics, Metric
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
        method: a name of :data:`loftq.solver.methods.METHODS`; by default that of
            :func:`loftq.config.default_method`.
        lora_alpha: LoRA's alpha, ``None`` for the rank. The factors are divided by sqrt(scaling) each, so the layer
            computes the fitted matrix for every alpha.
        use_rslora: scaling alpha / sqrt(r) instead of alpha / r.
        importance: the statistics of the layer's inputs, or their second moment alone: (in, in), or (in,) its diagonal. On
            any device. Of a layer that saw no input only the weight error is minimised.
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
        method = default_method(spec.bits, importance is not None)
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
    goal = _metric(chosen, statistics, damping, weight.device)
    found = []
    for name in names:
        candidate = METHODS[name]
        steps = num_iter if candidate.steps is None else min(candidate.steps, num_iter)
        metric = goal if name == method else _metric(candidate, statistics, damping, weight.device)
        search = Search(weight, spec, min(rank, *weight.shape), candidate, metric, svd, seed)
        found.append(search.run(steps))
    if chosen.candidates:
        judge = Search(weight, spec, rank, chosen, goal, svd, seed)
        scores = [s.errors[s.best_iter] if goal.factor is None else judge.objective(weight - s.dense()) for s in found]
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


def _metric(method: Method, statistics: InputStatistics | None, damping: float | None, device: torch.device) -> Metric:
    if statistics is None or method.metric == "none" or not statistics.informative:
        return Metric()
    damping = method.damping if damping is None else damping
    return statistics.metric(method.metric, damping, method.row_damping, method.guidance, device)


def _factors(lowrank: Adapter | None, weight: Tensor, rank: int, scaling: float, seed: int) -> tuple[Tensor, Tensor]:
    """A (r, in), B (out, r) with scaling * B A = L; what L does not fill starts as in PEFT."""
    out_features, in_features = weight.shape
    fitted = 0 if lowrank is None else lowrank.left.shape[1]
    lora_A = torch.empty(rank, in_features, dtype=torch.float32, device="cpu")
    lora_B = weight.new_zeros(out_features, rank)
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
