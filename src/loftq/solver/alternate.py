"""One matrix -> a quantized backbone and a LoRA pair that together are close to it (LoftQ, Algorithm 1).

    minimise |W - Q - scaling * B A|_F   over Q representable by the spec and A (r, in), B (out, r)

    quantization first (published):  Q <- quantize(W - L);  L <- SVD_r(W - Q)
    SVD first (ablation):            L <- SVD_r(W - Q);     Q <- quantize(W - L)

Both start from nothing, Q = L = 0. ``loftq-principal`` puts quantization first but starts from L = SVD_r(W), as PiSSA
does (arXiv 2404.02948): the largest directions of W are never quantized, and the weight error ends lower.

with L = scaling * B A. The published loop returns its last iterate, which need not be its best: with an absmax
quantizer the error is not monotone. Here the iterate with the smallest error is returned, plain quantization (L = 0)
being iterate 0, so the result is never worse than plain quantization.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loftq.codec import QuantizedTensor
from loftq.codec.blockwise import check_weight, comfortable_gain, divided, quantize_checked
from loftq.config import SVDS, QuantSpec, check_alpha, one_of, positive_int
from loftq.solver.lowrank import LowRank, truncated_svd
from loftq.solver.methods import method_named


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
    """

    quantized: QuantizedTensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    errors: list[float]
    best_iter: int

    @property
    def error(self) -> float:
        """Relative Frobenius error of the result."""
        return self.errors[self.best_iter]

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
    method: str = "loftq",
    lora_alpha: float | None = None,
    use_rslora: bool = False,
    svd: str = "auto",
    seed: int = 0,
) -> Decomposition:
    """Find Q, A and B for one matrix.

    Args:
        weight: (out, in), any floating dtype, any device. Computed in float32.
        spec: how Q is stored.
        rank: r. Beyond min(out, in) the surplus starts as PEFT starts an adapter: A random, B zero.
        num_iter: alternations T; 0 is plain quantization with PEFT's default adapter.
        method: ``loftq``, ``loftq-principal``, ``loftq-svd-first`` or ``qlora``; see :mod:`loftq.solver.methods`.
        lora_alpha: LoRA's alpha, ``None`` for the rank. The factors are divided by sqrt(scaling) each, so the layer
            computes the fitted matrix for every alpha.
        use_rslora: scaling alpha / sqrt(r) instead of alpha / r.
        svd: ``exact``, ``block`` or ``auto``; see :func:`loftq.solver.lowrank.truncated_svd`.
        seed: of the random start of the block power iteration and of A where it is not fitted.

    Raises:
        ConfigError: for a setting out of range.
        WeightError: for a weight with NaN or infinite elements, or that is no matrix.
    """
    positive_int("rank", rank)
    positive_int("num_iter", num_iter, 0)
    positive_int("seed", seed, 0)
    one_of("svd", svd, SVDS)
    check_alpha(lora_alpha)
    chosen = method_named(method)
    check_weight(weight)
    weight = weight.detach().float().contiguous()
    gain = comfortable_gain(weight)
    weight = divided(weight, gain)
    scaling = lora_scaling(lora_alpha, rank, use_rslora)
    steps = num_iter if chosen.alternate else 0
    fit_rank = min(rank, *weight.shape)

    norm = _norm(weight) or 1.0
    plain = quantize_checked(weight, spec, None)
    residual = weight - plain.dequantize()
    errors = [_norm(residual) / norm]
    best: tuple[int, QuantizedTensor, LowRank | None] = (0, plain, None)

    quantized = plain
    lowrank: LowRank | None = None
    if chosen.svd_first:
        residual = weight  # Q_0 = 0
    elif chosen.principal_start and steps:
        lowrank = truncated_svd(weight, fit_rank, method=svd, seed=seed)
        quantized = quantize_checked(_without(weight, lowrank), spec, None)
        residual = weight - quantized.dequantize()
    for step in range(1, steps + 1):
        basis = None if lowrank is None else lowrank.basis
        lowrank = truncated_svd(residual, fit_rank, method=svd, basis=basis, seed=seed)
        target = _without(weight, lowrank)
        if chosen.svd_first:
            quantized = quantize_checked(target, spec, quantized.tensors["weight_codebook"])
        dense = quantized.dequantize()
        errors.append(_norm(target - dense) / norm)
        if errors[step] < errors[best[0]]:
            best = (step, quantized, lowrank)
        if not chosen.svd_first and step < steps:
            quantized = quantize_checked(target, spec, quantized.tensors["weight_codebook"])
            dense = quantized.dequantize()
        residual = weight - dense

    best_iter, quantized, lowrank = best
    lora_A, lora_B = _factors(lowrank, weight, rank, scaling / gain, seed)
    return Decomposition(quantized.times(gain), lora_A, lora_B, scaling, errors, best_iter)


def _without(weight: Tensor, lowrank: LowRank) -> Tensor:
    """W - L."""
    return torch.addmm(weight, lowrank.U * lowrank.S, lowrank.Vh, alpha=-1)


def _norm(matrix: Tensor) -> float:
    """Frobenius norm: float32 within a row, float64 across rows."""
    return float(torch.linalg.vector_norm(torch.linalg.vector_norm(matrix, dim=1), dtype=torch.float64))


def _factors(lowrank: LowRank | None, weight: Tensor, rank: int, scaling: float, seed: int) -> tuple[Tensor, Tensor]:
    """A (r, in), B (out, r) with scaling * B A = U S Vh; what the SVD does not fill starts as in PEFT."""
    out_features, in_features = weight.shape
    fitted = 0 if lowrank is None else lowrank.S.numel()
    lora_A = torch.empty(rank, in_features)
    lora_B = torch.zeros(out_features, rank, device=weight.device)
    if fitted < rank:
        # PEFT's default: kaiming_uniform with a = sqrt(5), that is uniform in ±1/sqrt(in)
        generator = torch.Generator("cpu").manual_seed(seed)
        lora_A.uniform_(-1 / math.sqrt(in_features), 1 / math.sqrt(in_features), generator=generator)
    lora_A = lora_A.to(weight.device)
    if lowrank is not None:
        root = (lowrank.S / scaling).sqrt()
        lora_A[:fitted] = root[:, None] * lowrank.Vh
        lora_B[:, :fitted] = lowrank.U * root
    return lora_A, lora_B
