"""How far long work is, on stderr: a bar on a terminal, and elsewhere, as in a log file, a plain line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

EVERY = 60.0
"""Seconds between two plain lines, at least."""

_depth = 0
"""How many pieces of work are under way, one inside the other."""


def say(sentence: str) -> None:
    """A line on stderr, above the bar where there is one."""
    print(f"loftq: {sentence}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3 h 5 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else (f"{minutes} min" if minutes >= 5 else f"{60 * minutes + rest} s")


def amount(number: float, unit: str) -> str:
    """``1.2 Mweights``, ``3.4 steps``, ``0.25 steps``."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")):
        if number >= factor:
            return f"{number / factor:.1f} {letter}{unit}"
    return f"{number:.2f} {unit}"


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{amount(speed, self.unit)}/s" if speed else "")


class Lines:
    """Progress as plain lines: one at the start, then at most one a minute, and one at the end.

    Args:
        total: of the work; done: what an earlier run has done of it. label, unit: what is done, and counted.
        is_inner: part of other work, as a measurement in a training: then without the first line and the last.
        clock: gives seconds. write: takes a line.
    """

    def __init__(
        self,
        total: int,
        label: str,
        unit: str,
        done: int = 0,
        *,
        is_inner: bool = False,
        clock: Callable[[], float] = time.monotonic,
        write: Callable[[str], None] = say,
    ) -> None:
        self.total, self.done, self.label, self.unit = total, done, label, unit
        self.is_inner, self._clock, self._write = is_inner, clock, write
        self._known = done
        self._started = self._said = clock()
        if not is_inner:
            write(f"{label}: {self._position()}")

    def advance(self, what: str, amount: int) -> None:
        self.done += amount
        now = self._clock()
        if now - self._said < EVERY or self.done >= self.total:
            return
        self._said = now
        worked = self.done - self._known
        left = (self.total - self.done) * (now - self._started) / worked if worked else None
        ahead = "" if left is None else f", about {duration(left)} left"
        self._write(
            f"{self.label}: {self._position()}{self._rate()}{ahead}{f' ({what.strip()})' if what.strip() else ''}"
        )

    def end(self) -> None:
        """All is done, or no more is wanted."""
        if not self.is_inner:
            seconds = self._clock() - self._started
            self._write(f"{self.label}: {self._position()} in {duration(seconds)}{self._rate()}")

    def _position(self) -> str:
        if self.total < 10_000:
            return f"{self.done} of {self.total} {self.unit}"
        return f"{100 * self.done // self.total} % of {amount(self.total, self.unit)}"

    def _rate(self) -> str:
        seconds, worked = self._clock() - self._started, self.done - self._known
        return f", {amount(worked / seconds, self.unit)}/s" if worked and seconds >= 1 else ""


@contextmanager
def bar(
    total: int, label: str = "quantizing", unit: str = "weights", *, done: int = 0, show: bool = True
) -> Iterator[Callable[[str, int], None]]:
    """Yield ``advance(what, amount)``. Nothing is shown if ``show`` is false; else see :class:`Lines` for what is no terminal.

    ``done``: what an earlier run has done of the work, and does not count for the rate.
    """
    global _depth
    console = Console(stderr=True)
    if show and not console.is_terminal:
        lines = Lines(total, label, unit, done, is_inner=_depth > 0)
        _depth += 1
        try:
            yield lines.advance
        finally:
            _depth -= 1
        lines.end()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        _Rate(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not show) as progress:
        task = progress.add_task(label, total=total, completed=done)

        def advance(what: str, amount: int) -> None:
            progress.update(task, advance=amount, description=f"{label} {what[-40:]:<40}")

        yield advance
