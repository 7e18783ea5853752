"""Rounding a matrix under a full second moment of its inputs: error feedback, then coordinate descent.

Both minimise ``tr((W - Q) H (W - Q)^T)``. Error feedback (GPTQ, arXiv 2210.17323) rounds one column after the other and
takes each column's error out of the columns that are still to come, weighted by the rows of P⁻¹ with ``H = P Pᵀ``. With
H = I nothing is passed on: round-to-nearest. Coordinate descent then revisits every code, scale and level with all the
others known, each taking its best value; it never raises the objective.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loftq import kernels
from loftq.codec import QuantizedTensor
from loftq.codec.blockwise import (
    StoredScales,
    assemble,
    fit_scales,
    levels_given,
    normalised,
    rounded_levels,
    starting_levels,
    store_scales,
)
from loftq.codec.codebook import FITTED, thresholds
from loftq.codec.qtensor import dequantize_stored
from loftq.config import QuantSpec
from loftq.kernels.reference import levels_of
from loftq.solver.importance import Metric

# Levels are refitted under H up to this width: beyond, there are many and each is worth little.
_REFIT_BITS = 3


def round_with_feedback(
    weight: Tensor,
    spec: QuantSpec,
    metric: Metric,
    *,
    levels: Tensor | None = None,
    sweeps: int = 0,
    refit_levels: bool = True,
) -> QuantizedTensor:
    """Quantize a contiguous float32 (out, in) matrix so that its output error under a full metric is small.

    Scales are searched beforehand with each column weighted by what its error costs once later columns make up for it
    (``metric.conditional``), so that the order of rounding is free: columns of large second moment first ("act-order").

    Args:
        weight: what to quantize; finite.
        spec: how to store it.
        metric: a full one, with ``order`` and ``inverse``.
        levels: where fitting a codebook starts.
        sweeps: rounds of coordinate descent over codes and scales afterwards; 0 is GPTQ.
        refit_levels: let the descent begin with the levels of a fitted codebook.
    """
    assert metric.order is not None
    assert metric.inverse is not None
    counts = metric.conditional
    levels = starting_levels(weight, spec, levels, counts)
    stored = store_scales(*fit_scales(weight, spec, levels, counts), spec)
    if spec.codebook in FITTED:  # to the scales as they are stored, as plain quantization does
        codes = kernels.encode(weight, stored.scale, None, levels, thresholds(levels), spec.block_size)
        levels = rounded_levels(levels_given(weight, stored.scale, codes, levels, spec.block_size, counts), spec)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    dense = torch.empty_like(weight)
    work = weight[:, metric.order].contiguous()
    borders = thresholds(levels)
    for begin in range(0, weight.shape[1], spec.block_size):
        end = min(begin + spec.block_size, weight.shape[1])
        errors = kernels.feedback(
            work,
            metric.inverse,
            metric.order,
            stored.scale,
            stored.zero,
            levels,
            borders,
            spec.block_size,
            (begin, end),
            codes,
            dense,
        )
        if end < weight.shape[1]:
            work[:, end:].addmm_(errors, metric.inverse[begin:end, end:], alpha=-1)
    if sweeps:
        return _descend(weight, spec, metric, codes, dense, stored, levels, sweeps, refit_levels)
    return assemble(codes, stored, levels, spec)


def _descend(
    weight: Tensor,
    spec: QuantSpec,
    metric: Metric,
    codes: Tensor,
    dense: Tensor,
    stored: StoredScales,
    levels: Tensor,
    sweeps: int,
    refit_levels: bool,
) -> QuantizedTensor:
    """Levels, then codes and scales in turns, then codes once more under the scales as they are stored."""
    hessian = metric.hessian
    assert hessian is not None
    scale = stored.scale.clone()
    if refit_levels and spec.codebook in FITTED and spec.bits <= _REFIT_BITS:
        refit = _refit_levels if spec.codebook == "lloyd" else _refit_levels_by_row
        fitted = refit(weight, metric, codes, scale, levels, spec.block_size)
        if fitted is not None:
            levels, scale = rounded_levels(normalised(fitted), spec), scale * fitted.abs().amax(-1, keepdim=True)
            stored = store_scales(scale, stored.zero, spec)
            dense = levels_of(levels, codes) * _spread(scale, spec.block_size, weight.shape[1])
    free = spec.scale == "search"
    constants = (levels, thresholds(levels), spec.block_size)
    coupling = metric.row_hessian
    if free:
        if coupling is None:
            gradient = ((weight - dense) @ hessian).contiguous()
            kernels.descend(gradient, hessian, scale, stored.zero, *constants, codes, dense, sweeps, True)
        else:
            for _ in range(sweeps):
                error = weight - dense
                kernels.descend_coupled(error, hessian, coupling, scale, stored.zero, *constants, codes, dense, True)
        stored = store_scales(scale, stored.zero, spec)
    dense = dequantize_stored(assemble(codes, stored, levels, spec).tensors, spec, weight.shape[1])
    for _ in range(1 if free else sweeps):
        error = weight - dense
        if coupling is None:
            gradient = (error @ hessian).contiguous()
            kernels.descend(gradient, hessian, stored.scale, stored.zero, *constants, codes, dense, 1, False)
        else:
            kernels.descend_coupled(
                error, hessian, coupling, stored.scale, stored.zero, *constants, codes, dense, False
            )
    return assemble(codes, stored, levels, spec)


def _spread(scale: Tensor, block_size: int, in_features: int) -> Tensor:
    return scale.repeat_interleave(block_size, 1)[:, :in_features]


def _refit_levels(
    weight: Tensor, metric: Metric, codes: Tensor, scale: Tensor, levels: Tensor, block_size: int
) -> Tensor | None:
    """Least squares of all levels at once, given codes and scales; ``None`` if they would change order.

    With ``Q = sum_k l_k E_k`` the normal equations are ``N l = b``, ``N_kl = <G E_k H, E_l>``, ``b_k = <G E_k H, W>``.
    """
    spread = _spread(scale, block_size, weight.shape[1])
    parts = [spread * (codes == k) for k in range(levels.numel())]
    normal = torch.empty(len(parts), len(parts), dtype=torch.float64, device="cpu")
    right = torch.empty(len(parts), dtype=torch.float64, device="cpu")
    for k, part in enumerate(parts):
        product = part @ metric.hessian  # type: ignore[operator]
        if metric.row_hessian is not None:
            product = metric.row_hessian @ product
        right[k] = _inner(product, weight)
        for m in range(k, len(parts)):
            normal[k, m] = normal[m, k] = _inner(product, parts[m])
    ridge = 1e-9 * normal.diagonal().mean()
    normal.diagonal().add_(ridge)
    solved, failed = torch.linalg.solve_ex(normal, right + ridge * levels.double().cpu())
    if int(failed) > 0 or not bool((solved[1:] > solved[:-1]).all()):
        return None
    return solved.to(levels)


def _refit_levels_by_row(
    weight: Tensor, metric: Metric, codes: Tensor, scale: Tensor, levels: Tensor, block_size: int
) -> Tensor | None:
    """The same with levels of each row's own, where rows do not depend on each other; rows out of order stay."""
    if metric.row_hessian is not None:
        return None
    spread = _spread(scale, block_size, weight.shape[1])
    count = levels.shape[1]
    parts = [spread * (codes == k) for k in range(count)]
    normal = torch.empty(weight.shape[0], count, count, dtype=torch.float64, device=weight.device)
    right = torch.empty(weight.shape[0], count, dtype=torch.float64, device=weight.device)
    for k, part in enumerate(parts):
        product = part @ metric.hessian  # type: ignore[operator]
        right[:, k] = (product * weight).sum(1)
        for m in range(k, count):
            normal[:, k, m] = normal[:, m, k] = (product * parts[m]).sum(1)
    ridge = 1e-6 * normal.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp_min(1e-30)
    normal.diagonal(dim1=1, dim2=2).add_(ridge)  # a row of few elements leaves levels unused: they keep their place
    solved, failed = torch.linalg.solve_ex(normal, right + ridge * levels.double())
    solved = solved.to(levels)
    # as they will be stored: bfloat16 may cost a row more than the fit gains
    largest = solved.abs().amax(1, keepdim=True)
    rounded = normalised(solved).bfloat16().float() * largest
    ordered = (
        (solved[:, 1:] >= solved[:, :-1]).all(1) & (failed == 0) & torch.isfinite(solved).all(1) & (largest[:, 0] > 0)
    )

    def costs(values: Tensor) -> Tensor:
        error = weight - levels_of(values, codes) * spread
        return ((error @ metric.hessian) * error).sum(1)  # type: ignore[operator]

    kept = ordered & (costs(rounded.nan_to_num()) < costs(levels))
    return torch.where(kept[:, None], solved, levels)


def _inner(a: Tensor, b: Tensor) -> float:
    """<a, b>: float32 within a row, float64 across rows."""
    return float((a * b).sum(1).double().sum())
