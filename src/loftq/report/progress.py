"""One progress bar for long work: on a terminal only, with a rate and the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")):
            if speed >= factor:
                return Text(f"{speed / factor:.1f} {letter}{self.unit}/s")
        return Text(f"{speed:.2f} {self.unit}/s")


@contextmanager
def bar(
    total: int, label: str = "quantizing", unit: str = "weights", *, show: bool = True
) -> Iterator[Callable[[str, int], None]]:
    """Yield ``advance(what, amount)``. Drawn on stderr, and not at all where that is no terminal or ``show`` is false."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        _Rate(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as progress:
        task = progress.add_task(label, total=total)

        def advance(what: str, amount: int) -> None:
            progress.update(task, advance=amount, description=f"{label} {what[-40:]:<40}")

        yield advance
