"""Which cells of a sweep make a line of a picture, and what the line is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from loftq.ablate.factors import FACTORS, PLAIN, Factors
from loftq.ablate.settings import Ablation
from loftq.ablate.table import Row

MOST = 8
"""Lines that one picture can tell apart."""


class Series(NamedTuple):
    """A line: ``factors`` are those of one of its cells, ``cells`` the row at each value of the factor that varies."""

    factors: Factors
    cells: dict[Any, Row]


def series(settings: Ablation, rows: Mapping[Factors, Row], along: str) -> list[Series]:
    """The lines along one factor: cells that differ in nothing else, with as many of its values as any line has.

    Cells that were asked for differently and mean the same (T = 0 of any method) belong to every line that asked for them.
    Where there would be more than eight lines, those nearest to the base are kept.
    """
    groups: dict[Factors, dict[Any, Row]] = {}
    for asked, cell in settings.cells().items():
        row = rows.get(cell)
        if row is not None and row.error is None:
            rest = replace(asked, **cast(dict[str, Any], {along: None}))
            groups.setdefault(rest, {})[getattr(asked, along)] = row
    most = max((len(found) for found in groups.values()), default=0)
    kept = {rest: found for rest, found in groups.items() if len(found) == most}
    base = settings.sweep.base_cell
    for factor in ("damping", "codebook", "rank", "bits", "iters", "calibration", "method"):
        if len(_distinct(kept)) <= MOST or factor == along:
            continue
        wanted = (getattr(base, factor), 0) if factor == "iters" else (getattr(base, factor),)
        kept = {rest: found for rest, found in kept.items() if getattr(rest, factor) in wanted} or kept
    return _distinct(kept)


def _distinct(groups: Mapping[Factors, dict[Any, Row]]) -> list[Series]:
    found: dict[tuple[Factors, ...], Series] = {}
    for cells in groups.values():
        key = tuple(row.factors for row in cells.values())
        found.setdefault(key, Series(_typical(key), cells))
    return list(found.values())


def _typical(cells: tuple[Factors, ...]) -> Factors:
    """The cell that says most of what its line is: one with an adapter, where there is one."""
    return max(cells, key=lambda cell: (cell.method != PLAIN, cell.iters))


def names(lines: list[Series], along: str) -> tuple[list[str], str]:
    """A name for each line, of what tells it apart from the others, and what all have in common."""
    cells = [line.factors for line in lines]
    values = {n: {getattr(c, n) for c in cells if _applies(c, n)} for n in FACTORS if n != along}
    varying = {n for n, found in values.items() if len(found) > 1}
    first = max(cells, key=lambda cell: (cell.method != PLAIN, cell.rank))
    shared = [n for n in FACTORS if n not in (along, *varying) and _applies(first, n)]
    of_all = [n for n in shared if n not in ("damping", "calibration") or all(_applies(c, n) for c in cells)]
    common = [t for n, t in _forms(first).items() if n in of_all]
    return [_name(cell, varying, along) for cell in cells], ", ".join(common)


def _applies(cell: Factors, name: str) -> bool:
    """Whether a factor does anything in a cell."""
    if cell.method == PLAIN:
        return name in ("method", "bits", "codebook") or (name == "rank" and cell.rank > 0)
    if name == "rank":
        return cell.rank > 0
    return name not in ("damping", "calibration") or getattr(cell, name) is not None


def _name(cell: Factors, varying: set[str], along: str) -> str:
    own = f"{cell.method}" if cell.method != PLAIN else "QLoRA" if along == "iters" else "QLoRA (T = 0)"
    return ", ".join([own, *(t for n, t in _forms(cell).items() if n in varying and _applies(cell, n))])


def _forms(cell: Factors) -> dict[str, str]:
    return {
        "iters": f"T = {cell.iters}",
        "bits": f"{cell.bits:g} bits",
        "rank": f"rank {cell.rank}",
        "codebook": cell.codebook,
        "damping": "" if cell.damping is None else f"λ = {cell.damping:g}",
        "calibration": "" if cell.calibration is None else f"on {Path(cell.calibration).name}",
    }
