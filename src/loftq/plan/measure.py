"""What each choice of bits, block size and rank costs one module; see :mod:`loftq.plan.errors`."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loftq.config import LoftQConfig
from loftq.plan.file import Choice
from loftq.plan.targets import ModulePlan
from loftq.solver.importance import InputStatistics
from loftq.solver.methods import METHODS
from loftq.units import Known, decompose_module


@dataclass(frozen=True)
class ModuleErrors:
    """One module's entry in the table.

    Attributes:
        kind, shape, experts: as in :class:`loftq.plan.targets.ModulePlan`.
        layer: position of its layer in the model, ``None`` outside the layers.
        norm: |R W P|_F, the unit of ``objectives``, with the mean diagonals of H_λ and G_γ normalised to 1.
        power: tr(H) / in, which the normalisation took out, and tr(G) / out where gradients count: ``(objective * norm)²
            * power`` is the expected squared error of the layer's output, or with gradients what it does to the model's
            loss, E(gᵀ ΔW x)². ``None`` where no input was seen.
        objectives: choice -> relative objective.

    Of experts, means over them that count each as often as it got a token: what a token meets.
    """

    kind: str
    shape: tuple[int, int]
    layer: int | None
    norm: float
    power: float | None
    objectives: dict[Choice, float] = field(default_factory=dict)
    experts: int = 0

    @property
    def numel(self) -> int:
        return max(1, self.experts) * self.shape[0] * self.shape[1]


def measure_module(
    matrices: Sequence[Callable[[], Tensor]],
    plan: ModulePlan,
    choices: list[Choice],
    config: LoftQConfig,
    statistics: Known,
) -> ModuleErrors:
    """Decompose every matrix of a module with every choice; the layer is left open.

    Args:
        matrices: read them. plan: the module. choices: what to try. statistics: of the inputs, of experts each one's.
    """
    known = statistics if isinstance(statistics, Sequence) else [statistics] * len(matrices)
    parts = zip(matrices, plan.matrices(), known, strict=True)
    each = [_measure_matrix(read(), part, choices, config, of_part) for read, part, of_part in parts]
    if not plan.experts:
        return each[0]
    # those that got too few tokens have the statistics of all, and with them the number of all tokens
    shared = Counter(id(s.second_moment) for s in known if s is not None)
    shares = [1 if s is None or shared[id(s.second_moment)] > 1 else s.tokens for s in known]

    def mean(values: Iterable[float]) -> float:
        return math.fsum(n * v for n, v in zip(shares, values, strict=True)) / sum(shares)

    # Gradients, which are part of the other modules' powers, are not known of experts.
    assert config.method is not None
    seen = METHODS[config.method].row_damping is None and all(e.power is not None for e in each)
    powers = [e.power or 0.0 for e in each] if seen else [1.0] * len(each)
    power = mean(powers) or 1.0
    norm = math.sqrt(mean(p * e.norm**2 for p, e in zip(powers, each, strict=True)) / power)
    objectives = {
        choice: math.sqrt(
            mean(p * (e.objectives[choice] * e.norm) ** 2 for p, e in zip(powers, each, strict=True)) / power
        )
        / (norm or 1.0)
        for choice in choices
    }
    return ModuleErrors(plan.kind, plan.shape, None, norm, power if seen else None, objectives, plan.experts)


def _measure_matrix(
    weight: Tensor, plan: ModulePlan, choices: list[Choice], config: LoftQConfig, statistics: InputStatistics | None
) -> ModuleErrors:
    objectives: dict[Choice, float] = {}
    by_storage: dict[tuple[int, int], list[Choice]] = {}
    for choice in choices:
        by_storage.setdefault((choice.bits, choice.block_size), []).append(choice)
    norm, power = _unit(weight.T if plan.kind == "conv1d" else weight, plan.kind, config, statistics)
    # With one step of the published order Q does not depend on the rank, and the singular values of the largest rank's L
    # give the error at every smaller one.
    shared = config.method == "loftq" and config.num_iter == 1
    for group in by_storage.values():
        largest = max(group)
        for choice in [largest] if shared else group:
            spec = plan.spec.replace(bits=choice.bits, block_size=choice.block_size)
            module = dataclasses.replace(plan, spec=spec, rank=choice.rank)
            result = decompose_module(weight, module, config, statistics)
            objectives[choice] = result.objective
        if shared and len(group) > 1:
            removed = _removed_energy(result.lora_A, result.lora_B, result.scaling) / (norm or 1.0) ** 2
            for choice in group:
                left = result.errors[0] ** 2 - float(removed[: choice.rank].sum())
                # what rounding leaves at nearly full rank must not make a smaller rank look better than the largest
                objectives[choice] = math.sqrt(max(left, result.objective**2))
    return ModuleErrors(plan.kind, plan.shape, None, norm, power, objectives)


def _removed_energy(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """(r,) float64 squared singular values of scaling * B A, whose factors are orthogonal."""
    rows = torch.linalg.vector_norm(lora_A.double(), dim=1) * torch.linalg.vector_norm(lora_B.double(), dim=0)
    return (scaling * rows).square()


def _unit(
    weight: Tensor, kind: str, config: LoftQConfig, statistics: InputStatistics | None
) -> tuple[float, float | None]:
    """|R W P|, and what a squared unit of it is worth in squared output error."""
    weight = weight.float()
    if kind == "embedding":  # one row a token
        return _norm(weight), 1 / weight.shape[0]
    if statistics is None or not statistics.informative:
        return _norm(weight), None
    assert config.method is not None
    method = METHODS[config.method]
    power = float(statistics.diagonal.double().mean())
    if method.metric == "none":
        return _norm(weight), power
    damping = method.damping if config.damping is None else config.damping
    metric = statistics.metric(method.metric, damping, method.row_damping, method.guidance)
    if metric.row_factor is not None:
        assert statistics.output_moment is not None
        power *= float(statistics.output_moment.diagonal().double().mean())
    return _norm(metric.whiten(weight)), power


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
