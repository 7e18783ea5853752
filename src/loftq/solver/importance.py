"""What a layer's inputs say about which errors of its weight matter.

With inputs x the layer's output error is ``E|(W - M) x|^2 = tr((W - M) H (W - M)^T)``, ``H = E[x x^T]``: errors in
directions that the inputs use count, the others do not. The solver minimises it blended with the plain error,

    H_λ = (1 - λ) H d / tr(H) + λ I,        λ = 1: the weight error of LoftQ

so that a second moment estimated from few tokens, or a singular one, never leaves a direction without weight.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from loftq.errors import WeightError
from loftq.kernels.threads import threads_for

# Added to every H, as a share of its mean diagonal: what float32 resolves. Keeps the factor of a singular H finite.
_FLOOR = 1e-6


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of the inputs x (in,) of one layer over the calibration text, padding left out.

    Attributes:
        second_moment: H = E[x xᵀ] (in, in), or its diagonal (in,); float32.
        mean_abs: E|x| (in,), for LQER.
        tokens: how many inputs were seen; 0 for a layer that was never reached.
        drift: E[(x̂ - x) xᵀ] (in, in), where x is the input that the layer gets behind quantized layers and x̂ the one it
            gets in the full-precision model. ``None`` where x is the full-precision model's own.
        fisher_rows, fisher_columns: (out,) and (in,) means over the other dimension of the square root of the diagonal
            Fisher information, E[(∂loss/∂W)²]^½, for LQ-LoRA.
        output_moment: G = E[g gᵀ] (out, out), g the gradient of the model's loss in the layer's outputs: which directions
            of the output the model listens to.
        guided_moment: H_g = E[|g|² x xᵀ] / E|g|² (in, in): inputs, counted by how much the model listens to the layer where
            they occur (GuidedQuant, arXiv 2505.07004, with one group of outputs).

    What concerns gradients belongs to one layer, the rest to all that share the input.
    """

    second_moment: Tensor
    mean_abs: Tensor | None = None
    tokens: int = 1
    drift: Tensor | None = None
    fisher_rows: Tensor | None = None
    fisher_columns: Tensor | None = None
    output_moment: Tensor | None = None
    guided_moment: Tensor | None = None
    # factors by (kind, λ, device): the layers that share an input share this object, and so the factorisation
    _metrics: dict[tuple[str, float, torch.device], Metric] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    # factors by all arguments where gradients count: of one layer
    _own: dict[tuple[Any, ...], Metric] = field(default_factory=dict, init=False, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    @property
    def diagonal(self) -> Tensor:
        """E[x²] (in,)."""
        return self.second_moment if self.second_moment.dim() == 1 else self.second_moment.diagonal()

    @property
    def informative(self) -> bool:
        """Whether any input was seen and not all of them were zero."""
        return self.tokens > 0 and float(self.diagonal.sum()) > 0

    @property
    def factored(self) -> int:
        """Elements of the largest matrix that a metric may factor: H or G."""
        moments = [m for m in (self.second_moment, self.output_moment) if m is not None and m.dim() == 2]
        return max((m.numel() for m in moments), default=0)

    def check(self, in_features: int) -> None:
        """Refuse statistics that do not belong to a layer.

        Raises:
            WeightError: for another width, or NaN, infinite or negative moments.
        """
        shape = tuple(self.second_moment.shape)
        if shape not in ((in_features,), (in_features, in_features)):
            raise WeightError(
                f"the inputs' second moment has shape {shape}, expected {(in_features, in_features)} or {(in_features,)}; "
                f"calibrate on the model that is quantized"
            )
        if not torch.isfinite(self.second_moment).all() or bool((self.diagonal < 0).any()):
            raise WeightError(
                "the inputs' second moment has NaN, infinite or negative elements, expected E[x xᵀ]; calibrate again"
            )
        for name, expected in (
            ("mean_abs", (in_features,)),
            ("drift", (in_features, in_features)),
            ("fisher_columns", (in_features,)),
            ("guided_moment", (in_features, in_features)),
        ):
            value = getattr(self, name)
            if value is not None and (tuple(value.shape) != expected or not torch.isfinite(value).all()):
                raise WeightError(
                    f"the inputs' {name} has shape {tuple(value.shape)} or NaN or infinite elements, expected finite "
                    f"numbers of shape {expected}; calibrate again"
                )

    def on(self, device: torch.device) -> InputStatistics:
        """The same on another device, with nothing factored yet; itself where it is there already."""
        if self.second_moment.device == device:
            return self
        found: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        for name, value in found.items():
            found[name] = value.to(device) if isinstance(value, Tensor) else value
        return InputStatistics(**found)

    def metric(
        self,
        kind: str,
        damping: float,
        row_damping: float | None = None,
        guidance: float = 0.0,
        device: torch.device | None = None,
    ) -> Metric:
        """The metric of that kind; see :class:`Metric`. What concerns inputs is computed once for all that share them.

        Args:
            kind: ``mean-abs``, ``diagonal``, ``full`` or ``fisher``.
            damping: λ.
            row_damping: γ of ``G_γ = (1 - γ) G n / tr(G) + γ I``; ``None`` leaves G out.
            guidance: μ; in place of H / tr(H) counts ``(1 - μ) H / tr(H) + μ H_g / tr(H_g)``, where H_g is known and H is a
                matrix without drift.
            device: where it is computed and used, by default where the statistics are.
        """
        device = device or self.second_moment.device
        if kind == "fisher":
            return _fisher(self.on(device))
        guided = guidance and self.guided_moment is not None and self.drift is None and kind == "full"
        if guided or (self.output_moment is not None and row_damping is not None):
            key = (kind, damping, row_damping, guidance, device)
            with self._lock:
                if key not in self._own:
                    self._own[key] = self._of_gradients(kind, damping, row_damping, guidance if guided else 0.0, device)
                return self._own[key]
        with self._lock:
            return self._of_inputs(kind, damping, device)

    def _of_inputs(self, kind: str, damping: float, device: torch.device) -> Metric:
        key = (kind, damping, device)
        if key not in self._metrics:
            self._metrics[key] = _metric(self.on(device), kind, damping)
        return self._metrics[key]

    def _of_gradients(
        self, kind: str, damping: float, row_damping: float | None, guidance: float, device: torch.device
    ) -> Metric:
        if guidance and self.second_moment.dim() == 2 and self.guided_moment is not None:
            moments = (self.second_moment.to(device).double(), self.guided_moment.to(device).double())
            plain, guided = (m / m.diagonal().mean().clamp_min(torch.finfo(m.dtype).tiny) for m in moments)
            with threads_for(plain.numel()):
                metric = _full(plain.lerp(guided, guidance), None, damping)
        else:
            metric = self._of_inputs(kind, damping, device)
        if self.output_moment is None or row_damping is None:
            return metric
        with threads_for(self.output_moment.numel()):
            return _with_rows(metric, self.output_moment.to(device), row_damping)

    def of_layer(
        self,
        *,
        output_moment: Tensor | None = None,
        fisher_rows: Tensor | None = None,
        fisher_columns: Tensor | None = None,
        guided_moment: Tensor | None = None,
    ) -> InputStatistics:
        """The same inputs, with what is known of one layer's gradients; factors of the inputs stay shared."""
        found = replace(
            self,
            output_moment=output_moment,
            fisher_rows=fisher_rows,
            fisher_columns=fisher_columns,
            guided_moment=guided_moment,
        )
        object.__setattr__(found, "_metrics", self._metrics)
        object.__setattr__(found, "_lock", self._lock)
        return found


@dataclass(frozen=True)
class Metric:
    """A norm |E P| of weight errors E (out, in), with ``H_λ = P Pᵀ``.

    Attributes:
        hessian: H_λ (in, in) of mean diagonal 1, or its diagonal (in,), or ``None`` for the identity.
        order: (in,) columns by falling H_λ,jj, the order in which error feedback rounds them.
        factor: P (in, in), upper triangular, of ``H_λ[order][:, order]``; or its diagonal (in,).
        inverse: P⁻¹, so that ``H_λ⁻¹ = P⁻ᵀ P⁻¹``: its rows are what error feedback passes on.
        rows: (out,) what the error of each row counts, or ``None``.
        row_hessian: G_γ (out, out) of mean diagonal 1, or ``None`` for the identity; then the norm is ``|R E P|``.
        row_factor, row_inverse: R (out, out), upper triangular, with ``G_γ = Rᵀ R``, and R⁻¹.
        drift: ``D H_λ⁻¹ (1 - λ) d / tr(H)`` (in, in): with it ``W + W drift`` is what the layer should multiply its
            drifted inputs with, the minimiser of ``(1 - λ) d / tr(H) E|W x̂ - M x|² + λ |W - M|²``.
    """

    hessian: Tensor | None = None
    order: Tensor | None = None
    factor: Tensor | None = None
    inverse: Tensor | None = None
    rows: Tensor | None = None
    drift: Tensor | None = None
    row_hessian: Tensor | None = None
    row_factor: Tensor | None = None
    row_inverse: Tensor | None = None

    @property
    def columns(self) -> Tensor | None:
        """H_λ,jj (in,): what the error of each column counts by itself."""
        if self.hessian is None or self.hessian.dim() == 1:
            return self.hessian
        return self.hessian.diagonal().contiguous()

    @property
    def conditional(self) -> Tensor | None:
        """P_jj² (in,): what the rounding error of a column costs when the columns after it make up for it."""
        if self.factor is None or self.order is None:
            return None if self.hessian is None else self.hessian
        return torch.empty_like(self.factor[0]).scatter_(0, self.order, self.factor.diagonal().square())

    def whiten(self, error: Tensor) -> Tensor:
        """R E P."""
        if self.rows is not None:
            error = error * self.rows[:, None]
        if self.row_factor is not None:
            error = self.row_factor @ error
        if self.factor is None:
            return error
        if self.order is None:
            return error * self.factor
        return error[:, self.order] @ self.factor

    def unwhiten_columns(self, right: Tensor) -> Tensor:
        """(r, in) R P⁻¹."""
        if self.inverse is None:
            return right
        if self.order is None:
            return right * self.inverse
        return torch.empty_like(right).index_copy_(1, self.order, right @ self.inverse)

    def unwhiten_rows(self, left: Tensor) -> Tensor:
        """(out, r) R⁻¹ L."""
        if self.row_inverse is not None:
            return self.row_inverse @ left
        return left if self.rows is None else left / self.rows[:, None]


def _metric(statistics: InputStatistics, kind: str, damping: float) -> Metric:
    if kind == "mean-abs":
        assert statistics.mean_abs is not None
        return _diagonal(statistics.mean_abs.float().square(), damping)
    moment = statistics.second_moment.float()
    if kind == "diagonal" or moment.dim() == 1:
        return _diagonal(moment if moment.dim() == 1 else moment.diagonal(), damping)
    with threads_for(moment.numel()):
        return _full(moment, statistics.drift, damping)


def _blend(moment: Tensor, damping: float, eye: Tensor | float) -> Tensor:
    mean = moment.mean() if moment.dim() == 1 else moment.diagonal().mean()
    share = damping + _FLOOR * (1 - damping)
    return moment * ((1 - share) / mean) + eye * share


def _diagonal(moment: Tensor, damping: float) -> Metric:
    hessian = _blend(moment, damping, 1.0)
    return Metric(hessian=hessian, factor=hessian.sqrt(), inverse=hessian.rsqrt())


def _fisher(statistics: InputStatistics) -> Metric:
    assert statistics.fisher_rows is not None
    assert statistics.fisher_columns is not None
    rows, columns = statistics.fisher_rows.float(), statistics.fisher_columns.float()
    rows, columns = (v / v.mean() + _FLOOR if float(v.sum()) > 0 else torch.ones_like(v) for v in (rows, columns))
    return Metric(hessian=columns.square(), factor=columns, inverse=1 / columns, rows=rows)


def _full(moment: Tensor, drift: Tensor | None, damping: float) -> Metric:
    n = moment.shape[0]
    eye = torch.eye(n, dtype=torch.float64, device=moment.device)
    hessian = _blend(moment.double(), damping, eye)
    hessian = (hessian + hessian.T) / 2
    order = hessian.diagonal().argsort(descending=True, stable=True)
    # An upper factor P of H is the lower one of H with rows and columns reversed. One factor serves everything: P whitens,
    # P⁻¹ unwhitens, and the rows of P⁻¹ are GPTQ's.
    reversed_ = order.flip(0)
    lower, failed = torch.linalg.cholesky_ex(hessian[reversed_][:, reversed_])
    if int(failed) > 0:  # float32 moments may be indefinite by more than the floor
        lowest = torch.linalg.eigvalsh(hessian)[0]
        hessian = hessian + eye * (_FLOOR + 2 * lowest.abs())
        lower = torch.linalg.cholesky(hessian[reversed_][:, reversed_])
    factor = lower.flip(0, 1)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=True)
    target = None
    if drift is not None:
        scaled = drift.double() * ((1 - damping) / moment.diagonal().double().mean())
        target = torch.empty_like(scaled)
        target[:, order] = scaled[:, order] @ inverse.T @ inverse
        target = target.float()
    parts = (t.float().contiguous() for t in (hessian, factor, inverse))
    hessian, factor, inverse = parts
    return Metric(hessian=hessian, order=order, factor=factor, inverse=inverse, drift=target)


def _with_rows(metric: Metric, moment: Tensor, damping: float) -> Metric:
    eye = torch.eye(moment.shape[0], dtype=torch.float64, device=moment.device)
    if float(moment.diagonal().sum()) <= 0:
        return metric
    hessian = _blend(moment.double(), damping, eye)
    hessian = (hessian + hessian.T) / 2
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if int(failed) > 0:
        hessian = hessian + eye * (_FLOOR + 2 * torch.linalg.eigvalsh(hessian)[0].abs())
        lower = torch.linalg.cholesky(hessian)
    inverse = torch.linalg.solve_triangular(lower.T, eye, upper=True)
    return replace(
        metric, row_hessian=hessian.float(), row_factor=lower.T.contiguous().float(), row_inverse=inverse.float()
    )
