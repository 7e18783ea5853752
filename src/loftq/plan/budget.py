"""Bits, block size and rank of every module so that the summed error is smallest under a budget.

    minimise   Σ_m cost[m, x_m]     subject to     Σ_m usage[m, x_m] <= limit

over one choice x_m a module: a multiple-choice knapsack with one budget for the backbone (stored bytes, or bits of code)
and, where ranks are chosen too, a second one for the adapters' parameters. The answer is exact; see
:func:`loftq.plan.knapsack.minimise`.

``cost`` is a module's squared objective *after* the low-rank term, from an :class:`loftq.plan.errors.ErrorTable`:

    relative: objective²                            the modules' relative output errors count alike
    absolute: (objective · |R W P|)² · power        E|(W - Q - L) x|², the squared error of the outputs themselves; with
                                                    gradients g in them E(gᵀ (W - Q - L) x)², the loss to second order
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from loftq.codec.qtensor import storage_layout
from loftq.config import is_number, one_of
from loftq.errors import ConfigError
from loftq.plan.errors import ErrorTable, ModuleErrors
from loftq.plan.file import Choice
from loftq.plan.knapsack import minimise
from loftq.solver.methods import METHODS

WEIGHTINGS = ("relative", "absolute")


@dataclass(frozen=True)
class Budget:
    """What a plan may use. Of the first three one is given; the averages run over all planned weights.

    Attributes:
        bits_per_weight: stored bytes (codes, scales, codebooks) * 8 / weights.
        code_bits: average width of the codes alone, the papers' "2.5 bits".
        nbytes: stored bytes.
        average_rank: adapters may have the parameters that this rank would have everywhere.
        adapter_bytes: bytes of the adapters in float32.

    Raises:
        ConfigError: for none or several of the first three, both of the last two, or a number that is not positive.
    """

    bits_per_weight: float | None = None
    code_bits: float | None = None
    nbytes: int | None = None
    average_rank: float | None = None
    adapter_bytes: int | None = None

    def __post_init__(self) -> None:
        given = [n for n in ("bits_per_weight", "code_bits", "nbytes") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"{' and '.join(given) if given else 'no budget'} given, expected one of bits_per_weight (measured), "
                f"code_bits (width of the codes) and nbytes"
            )
        if self.average_rank is not None and self.adapter_bytes is not None:
            raise ConfigError("average_rank and adapter_bytes given, expected one of them; drop the other")
        for name, value in vars(self).items():
            if value is not None and not (is_number(value) and value > 0):
                raise ConfigError(f"{name} is {value!r}, expected a positive number")

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Allocation:
    """A choice for every module, and what it takes.

    Attributes:
        choices: module -> choice. objective: Σ cost. weights: of all modules.
        weight_bytes: stored bytes. code_bits: average width of the codes. adapter_parameters: of all adapters.
        gap: proven bound on how much better another plan could be, relative; 0 where the plan is exact or a rule's.
    """

    choices: dict[str, Choice]
    objective: float
    weights: int
    weight_bytes: int
    code_bits: float
    adapter_parameters: int
    gap: float = 0.0

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.weight_bytes / self.weights

    def totals(self) -> dict[str, Any]:
        values = {name: value for name, value in vars(self).items() if name != "choices"}
        return {**values, "bits_per_weight": self.bits_per_weight}


def stored_bytes(table: ErrorTable, name: str, choice: Choice) -> int:
    """Bytes of a module's codes, scales and codebook."""
    entry = table.modules[name]
    return sum(info.nbytes for info in storage_layout(table.spec(choice), entry.shape, entry.experts).values())


def adapter_parameters(entry: ModuleErrors, rank: int) -> int:
    """Elements of A (r, in) and B (out, r), of every expert's."""
    return max(1, entry.experts) * rank * sum(entry.shape)


def best_weighting(table: ErrorTable) -> str:
    """``absolute`` where the errors were measured with gradients, ``relative`` otherwise.

    On stories260K, one module at a time at 2 and at 4 bits, the increase in KL divergence has a rank correlation with
    ``absolute`` of 0.93 and 0.95 with gradients, but of only 0.4 to 0.65 without, and there plans by ``relative`` are mostly
    the better ones.
    """
    calibration = table.settings.get("calibration") or {}
    known = bool(calibration.get("gradients")) and METHODS[table.settings["method"]].row_damping is not None
    return "absolute" if known else "relative"


def module_cost(table: ErrorTable, name: str, choice: Choice, weighting: str | None) -> float:
    """The choice's term of the objective; see the module's docstring.

    A layer that no calibration text reached counts in ``absolute`` as if its inputs were the other layers' mean.

    Raises:
        ConfigError: for another weighting than those of :data:`WEIGHTINGS`.
    """
    weighting = one_of("weighting", weighting or best_weighting(table), WEIGHTINGS)
    entry = table.modules[name]
    objective = entry.objectives[choice]
    if weighting == "relative":
        return objective**2
    powers = [e.power for e in table.modules.values() if e.power is not None and e.kind != "embedding"]
    power = entry.power if entry.power is not None else (sum(powers) / len(powers) if powers else 1.0)
    return (objective * entry.norm) ** 2 * power


def evaluate(
    table: ErrorTable, choices: Mapping[str, Choice], weighting: str | None = None, gap: float = 0.0
) -> Allocation:
    """What a plan takes and what it costs."""
    weights = sum(entry.numel for entry in table.modules.values())
    return Allocation(
        choices=dict(choices),
        objective=math.fsum(module_cost(table, name, choice, weighting) for name, choice in choices.items()),
        weights=weights,
        weight_bytes=sum(stored_bytes(table, name, choice) for name, choice in choices.items()),
        code_bits=sum(table.modules[name].numel * choice.bits for name, choice in choices.items()) / weights,
        adapter_parameters=sum(adapter_parameters(table.modules[n], c.rank) for n, c in choices.items()),
        gap=gap,
    )


def best_plan(table: ErrorTable, budget: Budget, weighting: str | None = None) -> Allocation:
    """The plan with the smallest objective within the budget.

    Raises:
        ConfigError: if the budget lies below what any plan takes, or above what the largest could use.
    """
    names = list(table.modules)
    options = [list(table.modules[name].objectives) for name in names]
    ranks = {choice.rank for group in options for choice in group}
    limited = budget.average_rank is not None or budget.adapter_bytes is not None
    if len(ranks) > 1 and not limited:
        raise ConfigError(
            f"ranks {', '.join(map(str, sorted(ranks)))} to choose from but no budget for the adapters, so the largest would "
            f"always win; give a rank budget or one rank"
        )
    costs = [np.array([module_cost(table, n, c, weighting) for c in g]) for n, g in zip(names, options, strict=True)]
    usage = [np.array([_usage(table, n, c, budget) for c in g]) for n, g in zip(names, options, strict=True)]
    limits = _limits(table, budget)
    for column, unit in enumerate(_units(table, budget)):
        lowest, highest = (sum(int(f(u[:, column])) for u in usage) for f in (np.min, np.max))
        beyond = limits[column] > highest and (column == 0 or len(ranks) > 1)
        if limits[column] < lowest or beyond:
            what, given, low, high = unit(lowest, highest)
            raise ConfigError(
                f"{what} is {given:g}, but these choices can give from {_rounded(low, up=True)} to {_rounded(high, up=False)}; "
                f"choose a budget in that range or other bits, block sizes and ranks"
            )
    picked, gap = minimise(costs, usage, limits)
    choices = {name: group[k] for name, group, k in zip(names, options, picked, strict=True)}
    return evaluate(table, choices, weighting, gap)


def _rounded(value: float, *, up: bool) -> str:
    """Five digits, rounded into the range, so that what an error message offers is accepted."""
    digits = max(0, 4 - math.floor(math.log10(value))) if value > 0 else 0
    scaled = math.ceil(value * 10**digits) if up else math.floor(value * 10**digits)
    return f"{scaled / 10**digits:.{digits}f}".rstrip("0").rstrip(".") if digits else str(scaled)


def _usage(table: ErrorTable, name: str, choice: Choice, budget: Budget) -> list[int]:
    entry = table.modules[name]
    backbone = entry.numel * choice.bits if budget.code_bits is not None else stored_bytes(table, name, choice)
    limited = budget.average_rank is not None or budget.adapter_bytes is not None
    return [backbone, adapter_parameters(entry, choice.rank)] if limited else [backbone]


def _limits(table: ErrorTable, budget: Budget) -> list[int]:
    weights = sum(entry.numel for entry in table.modules.values())
    if budget.bits_per_weight is not None:
        limits = [_floor(budget.bits_per_weight, Fraction(weights, 8))]
    elif budget.code_bits is not None:
        limits = [_floor(budget.code_bits, weights)]
    else:
        assert budget.nbytes is not None
        limits = [int(budget.nbytes)]
    if budget.average_rank is not None:
        parameters = sum(adapter_parameters(entry, 1) for entry in table.modules.values())
        limits.append(_floor(budget.average_rank, parameters))
    elif budget.adapter_bytes is not None:
        limits.append(int(budget.adapter_bytes) // 4)
    return limits


def _floor(average: float, count: int | Fraction) -> int:
    """How many whole units an average allows.

    In fractions, of the number that was typed: 2.3 rather than the float just below it. The thousandth is for averages that
    were measured: printed and read again, one must allow what it was measured on.
    """
    return math.floor(Fraction(repr(float(average))) * count + Fraction(1, 1000))


def _units(table: ErrorTable, budget: Budget) -> list[Any]:
    """For each budget: (lowest, highest) usage -> (its name, what was given, lowest and highest in its unit)."""
    weights = sum(entry.numel for entry in table.modules.values())
    parameters = sum(adapter_parameters(entry, 1) for entry in table.modules.values())
    scales = {
        "bits_per_weight": ("target bits per weight (scales included)", Fraction(8, weights)),
        "code_bits": ("target bits (codes alone)", Fraction(1, weights)),
        "nbytes": ("target bytes", Fraction(1)),
        "average_rank": ("average rank", Fraction(1, parameters)),
        "adapter_bytes": ("adapter bytes", Fraction(4)),
    }

    def unit(key: str, given: float) -> Any:
        what, scale = scales[key]
        return lambda low, high: (what, given, float(low * scale), float(high * scale))

    return [unit(key, value) for key, value in budget.to_dict().items()]


def uniform_plan(table: ErrorTable, choice: Choice, weighting: str | None = None) -> Allocation:
    """The same choice for every module."""
    return evaluate(table, dict.fromkeys(table.modules, choice), weighting)


def first_layers_plan(
    table: ErrorTable, count: int, high: Choice, low: Choice, weighting: str | None = None
) -> Allocation:
    """The paper's mixed precision: ``high`` for the first ``count`` layers, ``low`` for the others and outside the layers."""
    layers = {name: entry.layer for name, entry in table.modules.items()}
    return evaluate(table, {n: high if k is not None and k < count else low for n, k in layers.items()}, weighting)


def largest_first_layers(
    table: ErrorTable, budget: Budget, high: Choice, low: Choice, weighting: str | None = None
) -> tuple[int, Allocation]:
    """(k, plan) of the largest k for which :func:`first_layers_plan` keeps to the backbone's budget.

    Raises:
        ConfigError: if even k = 0 does not, or ``high`` takes no more than ``low``.
    """
    if high.bits <= low.bits:
        raise ConfigError(
            f"the first layers would get {high.bits} bits and the others {low.bits}, expected more for the first"
        )
    limit = _limits(table, budget)[0]
    used = {c: {n: _usage(table, n, c, budget)[0] for n in table.modules} for c in (high, low)}
    total = sum(used[low].values())
    if total > limit:
        (unit, *_) = _units(table, budget)
        what, given, lowest, _ = unit(total, total)
        raise ConfigError(
            f"{what} is {given:g}, but {low.bits} bits in every layer take {_rounded(lowest, up=True)}; raise it"
        )
    last = max((e.layer for e in table.modules.values() if e.layer is not None), default=-1)
    count = 0
    while count <= last:
        total += sum(used[high][n] - used[low][n] for n, e in table.modules.items() if e.layer == count)
        if total > limit:
            break
        count += 1
    return count, first_layers_plan(table, count, high, low, weighting)


def equal_bytes_first_layers(
    table: ErrorTable, plan: Allocation, high: Choice, low: Choice, weighting: str | None = None
) -> tuple[int, Allocation]:
    """:func:`largest_first_layers` with the stored bytes of ``plan`` as the budget."""
    return largest_first_layers(table, Budget(nbytes=plan.weight_bytes), high, low, weighting)


def comparisons(
    table: ErrorTable, plan: Allocation, base: Choice, weighting: str | None = None
) -> dict[str, Allocation]:
    """Plans to hold ``plan`` against, by what a reader calls them.

    The uniform plans just below and above its bytes, and the first-k-layers rule at no more bytes: 4 over 2 bits as in the
    paper where these are among the choices and the bytes lie between them, and otherwise between the uniform neighbours.
    All with the block size and rank of ``base``.
    """
    shared = set.intersection(*(set(e.objectives) for e in table.modules.values()))
    alike = sorted(c for c in shared if (c.block_size, c.rank) == (base.block_size, base.rank))
    uniform = {c: uniform_plan(table, c, weighting) for c in alike}
    below = [c for c in alike if uniform[c].weight_bytes <= plan.weight_bytes][-1:]
    above = [c for c in alike if uniform[c].weight_bytes > plan.weight_bytes][:1]
    found = {f"{c.bits} bits": uniform[c] for c in below + above}
    pair = [c for c in alike if c.bits in (2, 4)]
    if len(pair) != 2 or not uniform[pair[0]].weight_bytes <= plan.weight_bytes <= uniform[pair[1]].weight_bytes:
        pair = below + above
    if len(pair) == 2:
        low, high = pair
        count, rule = equal_bytes_first_layers(table, plan, high, low, weighting)
        found[f"first {count} layers {high.bits} bits, rest {low.bits}"] = rule
    return found
