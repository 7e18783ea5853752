"""What the verbs that measure cell after cell say while they do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import typer

T = TypeVar("T")


def follow(
    found: Iterable[tuple[T, bool]], total: int, line: Callable[[T], str], counts: Callable[[T], bool]
) -> list[T]:
    """A line on stderr for each cell, with about how long the others will take.

    Args:
        found: cells, and whether each was measured just now. total: how many there will be.
        line: a cell in words. counts: whether it took the same kind of work as the others, for the time left.
    """
    from loftq.report.progress import duration

    cells: list[T] = []
    spent: list[float] = []
    started = time.perf_counter()
    for cell, fresh in found:
        cells.append(cell)
        left = total - len(cells)
        if fresh and counts(cell):
            spent.append(time.perf_counter() - started)
        started = time.perf_counter()
        ahead = f"; about {duration(left * sum(spent) / len(spent))} left" if spent and left else ""
        typer.echo(f"[{len(cells)}/{total}] {line(cell)}{'' if fresh else ', known'}{ahead}", err=True)
    return cells
