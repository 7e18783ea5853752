"""The multiple-choice knapsack: one option of every group, least cost, within one or two budgets; exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loftq.errors import ConfigError

_NARROW = 5_000  # partial plans held while the gap is searched
_WIDE = 100_000  # and for the proof, under a minute for 224 modules


def minimise(
    costs: Sequence[np.ndarray], usage: Sequence[np.ndarray], limits: Sequence[int]
) -> tuple[list[int], float]:
    """The cheapest choice of one option a module within every limit: (option of each module, proven relative gap).

    With multipliers λ >= 0 of the linear relaxation, ``reduced = cost + λ·usage - min over the module's options`` and
    ``bound = Σ min(cost + λ·usage) - λ·limit``, any plan costs

        cost(x) = bound + Σ reduced(x) + λ·(limit - usage(x)).

    So all plans within a distance g of the bound are found by adding module after module to partial plans and dropping
    those whose reduced costs and certainly unused budget exceed g, and those that another one beats in cost and usage. g
    doubles until there is a plan; no other can then be better, to the rounding of float64 (1e-12 of the objective).
    (Pisinger 1995, "A minimal algorithm for the multiple-choice knapsack problem", expands the same core.) Partial plans
    that would be too many to hold are dropped and a gap is returned: with two budgets and hundreds of modules it can
    happen, with one it does not.

    This is used instead of branch and bound (``scipy.optimize.milp``), which on a model whose layers are nearly alike does
    not close the last 1e-3 in a minute: 224 modules with 12 options each took 0.4 s here.

    Args:
        costs: (options,) of each module, >= 0.
        usage: (options, budgets) integers of each module.
        limits: (budgets,) integers.

    Raises:
        ConfigError: if no plan keeps to the limits.
    """
    lowest = [u.min(0) for u in usage]
    spare = np.asarray(limits, dtype=np.int64) - np.sum(lowest, axis=0)
    if (spare < 0).any():
        raise ConfigError("no plan keeps to the budget even with the cheapest choices; raise it")
    largest = max(float(c.max()) for c in costs) or 1.0
    scaled = [np.asarray(c, dtype=np.float64) / largest for c in costs]
    extra = [np.asarray(u, dtype=np.int64) - low for u, low in zip(usage, lowest, strict=True)]
    multipliers = _multipliers(scaled, extra, spare)
    total = [c + e @ multipliers for c, e in zip(scaled, extra, strict=True)]
    reduced = [t - t.min() for t in total]
    bound = sum(float(t.min()) for t in total) - float(multipliers @ spare)
    slop = 1e-12 * len(costs)
    everything = sum(float(r.max()) for r in reduced) + float(multipliers @ spare) + slop
    gap = 1e-6 * max(bound, 1e-3) + slop
    while True:
        found = _within(reduced, extra, spare, multipliers, gap, _NARROW)
        if found.plan is not None:
            break
        if gap > everything:
            raise ConfigError("no plan keeps to both budgets; raise one of them")
        gap *= 2
    if found.complete:
        return found.plan, 0.0
    again = _within(reduced, extra, spare, multipliers, found.distance + slop, _WIDE)
    if again.plan is not None and again.distance <= found.distance:
        found = again
    assert found.plan is not None
    return found.plan, 0.0 if again.complete else found.distance / max(bound + found.distance, slop)


@dataclass(frozen=True)
class _Found:
    """A plan, its distance from the bound, and whether no partial plan that could beat it was dropped."""

    plan: list[int] | None
    distance: float
    complete: bool


def _multipliers(costs: Sequence[np.ndarray], usage: Sequence[np.ndarray], limits: np.ndarray) -> np.ndarray:
    """λ (budgets,) of the linear relaxation; any λ >= 0 gives a valid bound, these the best."""
    from scipy.optimize import linprog

    scale, equal, used = _matrices(costs, usage, limits)
    result = linprog(
        np.concatenate(costs), A_ub=used, b_ub=limits / scale, A_eq=equal, b_eq=np.ones(len(costs)), method="highs"
    )
    if result.status != 0:
        return np.zeros(len(limits))
    return np.maximum(-result.ineqlin.marginals, 0) / scale


def _matrices(costs: Sequence[np.ndarray], usage: Sequence[np.ndarray], limits: np.ndarray) -> tuple[Any, Any, Any]:
    from scipy.sparse import csr_array

    owner = np.repeat(np.arange(len(costs)), [len(c) for c in costs])
    used = np.concatenate(usage).T.astype(np.float64)
    scale = np.maximum(used.max(1), 1.0)
    equal = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(len(costs), len(owner)))
    return scale, equal, used / scale[:, None]


def _within(
    reduced: Sequence[np.ndarray],
    usage: Sequence[np.ndarray],
    limits: np.ndarray,
    multipliers: np.ndarray,
    gap: float,
    width: int,
) -> _Found:
    """The best plan within ``gap`` of the bound, from at most ``width`` partial plans a step: those nearest to it."""
    kept = [np.flatnonzero(r <= gap) for r in reduced]
    spread = [int(u[k, 0].max() - u[k, 0].min()) for u, k in zip(usage, kept, strict=True)]
    order = sorted(range(len(kept)), key=lambda m: -spread[m])
    least = np.array([usage[m][kept[m]].min(0) for m in order])
    most = np.array([usage[m][kept[m]].max(0) for m in order])
    used = np.zeros((1, len(limits)), dtype=np.int64)
    paid = np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    complete = True
    for step, m in enumerate(order):
        used = (used[:, None] + usage[m][kept[m]]).reshape(-1, len(limits))
        paid = (paid[:, None] + reduced[m][kept[m]]).ravel()
        distance = paid + np.maximum(limits - used - most[step + 1 :].sum(0), 0) @ multipliers
        alive = np.flatnonzero((distance <= gap) & (used + least[step + 1 :].sum(0) <= limits).all(1))
        alive = alive[_undominated(used[alive], paid[alive] - used[alive] @ multipliers)]
        if not len(alive):
            return _Found(None, math.inf, complete)
        if len(alive) > width:
            alive = alive[np.argsort(distance[alive], kind="stable")[:width]]
            complete = False
        used, paid = used[alive], paid[alive]
        trail.append((alive // len(kept[m]), kept[m][alive % len(kept[m])]))
    total = paid + (limits - used) @ multipliers
    state = int(np.argmin(total))
    distance_found = float(total[state])
    plan = [0] * len(order)
    for m, (parents, options) in zip(reversed(order), reversed(trail), strict=True):
        plan[m], state = int(options[state]), int(parents[state])
    return _Found(plan, distance_found, complete)


def _undominated(used: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Indices of states that no other one with the same second usage beats in both the first usage and cost."""
    last = used[:, -1] if used.shape[1] > 1 else np.zeros(len(used), dtype=np.int64)
    order = np.lexsort((cost, used[:, 0], last))
    # Ranks instead of costs: exact integers, which a running minimum can restart in at every group.
    place = np.empty(len(order), dtype=np.int64)
    place[order[np.argsort(cost[order], kind="stable")]] = np.arange(len(order))
    group = np.concatenate([[0], np.cumsum(np.diff(last[order]) != 0)]) if len(order) else order
    key = place[order] - group * len(order)
    best = np.minimum.accumulate(key)
    first = np.ones(len(order), dtype=bool)
    first[1:] = best[1:] < best[:-1]
    return order[first]
