"""How far an initialisation is from the pretrained weights: the figures of LoftQ (arXiv 2310.08659).

E = W - Q - scaling · B A        frobenius ‖E‖_F, spectral ‖E‖₂ (the largest singular value), and both by those of W
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, svds
from torch import Tensor

from loftq.checkpoint.source import Source
from loftq.evaluate.output_error import ErrorMeter
from loftq.plan.targets import layer_positions

_EXACT = 256  # up to this many singular values LAPACK takes milliseconds
_TOLERANCE = 1e-6  # of the eigenvalue, the square of the singular value


@dataclass(frozen=True)
class Discrepancy:
    """One module of one cell.

    Attributes:
        name: of the module. kind: its name within its layer, such as ``self_attn.q_proj``. layer: counted through the
            stacks of the model in order; ``None`` outside of layers.
        frobenius, spectral: ‖E‖_F and ‖E‖₂. frobenius_relative, spectral_relative: by ‖W‖_F and ‖W‖₂.
    """

    name: str
    kind: str
    layer: int | None
    frobenius: float
    frobenius_relative: float
    spectral: float
    spectral_relative: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


NORMS = ("frobenius", "frobenius_relative", "spectral", "spectral_relative")


def spectral_norm(matrix: Tensor) -> float:
    """Largest singular value of (m, n): by LAPACK in float64 where it is small, by Lanczos (ARPACK) in float32 elsewhere.

    Quantization errors have no gap below their largest singular value, where power iteration is slow; Lanczos is not: a
    random 2048 × 2048 takes a fifteenth of LAPACK's time, with a relative error of 1e-8.
    """
    if min(matrix.shape) <= _EXACT:
        return float(torch.linalg.matrix_norm(matrix.double(), 2))
    array = matrix.detach().float().cpu().numpy()
    scale = float(np.abs(array).max())
    if scale == 0:
        return 0.0
    start = np.random.default_rng(0).standard_normal(min(array.shape)).astype(np.float32)
    try:  # in units of its largest element, whose square cannot overflow
        found = svds(array / scale, k=1, tol=_TOLERANCE, v0=start, return_singular_vectors=False, solver="arpack")
    except ArpackError:  # no convergence
        return float(torch.linalg.matrix_norm(matrix.double(), 2))
    return scale * float(found[0])


class DiscrepancyMeter:
    """Measures quantized folders of one source; the norms of its weights are computed once."""

    def __init__(self, source: Source) -> None:
        self._meter = ErrorMeter(source)
        self._norms: dict[str, tuple[float, float]] = {}

    def measure(self, folder: Path) -> list[Discrepancy]:
        """The discrepancy of every module of a folder, with its fitted adapter.

        Raises:
            SourceError: if the folder is damaged or of another source.
        """
        found = []
        for plan, weight, error in self._meter.residuals(folder):
            if plan.name not in self._norms:
                self._norms[plan.name] = _frobenius(weight), spectral_norm(weight)
            frobenius, spectral = _frobenius(error), spectral_norm(error)
            whole, largest = self._norms[plan.name]
            found.append(
                (plan.name, frobenius, _share(frobenius, whole), spectral, _share(spectral, largest)),
            )
        layers = layer_positions([name for name, *_ in found])
        return [Discrepancy(name, module_kind(name), layers.get(name), *norms) for name, *norms in found]


def module_kind(name: str) -> str:
    """``model.layers.3.mlp.down_proj`` -> ``mlp.down_proj``; experts of a layer are one kind; outside of layers the name."""
    match = re.match(r"^.*?\.\d+\.(.+)$", name)
    return name if match is None else re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", match[1])


def means(modules: list[Discrepancy]) -> dict[str, float]:
    """The mean of every norm over the modules."""
    return {norm: sum(getattr(m, norm) for m in modules) / len(modules) for norm in NORMS}


def _frobenius(matrix: Tensor) -> float:
    return float(matrix.square().sum(dtype=torch.float64).sqrt())


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
