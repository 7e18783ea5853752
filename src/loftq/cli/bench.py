"""``loftq bench``"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loftq.cli import parse
from loftq.cli.quiet import quiet_transformers

if TYPE_CHECKING:
    from loftq.bench.bounds import Judged
    from loftq.bench.case import Case


def bench(
    suites: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SUITE]...", help="dequantize, linear, solver, model; all by default.", show_default="all"
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Repeats of every candidate, at least.")] = 7,
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes, to see that everything runs.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File for the results and every repeat.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Time the packed layers and the solver on the CPU, beside dense layers and bitsandbytes, taken in turns."""
    quiet_transformers()
    from loftq.bench.case import Options
    from loftq.bench.run import Bench
    from loftq.bench.units import amount
    from loftq.checkpoint.writer import check_file
    from loftq.report.tables import console, print_json, table

    options = Options(repeats, quick, lambda sentence: typer.echo(f"loftq: {sentence}", err=True))
    bench = Bench(suites or (), options, command=parse.this_command())
    if out is not None:
        check_file(out, "the results")
    for case, _ in bench.run():
        shown = ", ".join(f"{name} {amount(case.median(name), case.unit)}" for name in case.values)
        typer.echo(f"{case.suite}: {case.name}: {shown}", err=True)
        if out is not None:
            bench.save(out)
    if out is not None:
        bench.save(out)
    if json_output:
        print_json(bench.to_dict())
        return
    screen = console()
    for suite in bench.suites:
        cases = [case for case in bench.cases if case.suite == suite]
        if cases:
            screen.print(f"{suite}: {bench.title(suite)}")
            rows = [row for case in cases for row in _rows(case, bench.judged)]
            filled = [i for i, _ in enumerate(COLUMNS) if any(row[i] for row in rows)]
            columns = {name: justify for i, (name, justify) in enumerate(COLUMNS.items()) if i in filled}
            screen.print(table(columns, [[row[i] for i in filled] for row in rows]))
    if bench.judged:
        met = sum(judged.met is True for judged in bench.judged)
        missed = sum(judged.met is False for judged in bench.judged)
        screen.print(f"{met} bounds met, {missed} missed, {len(bench.judged) - met - missed} not measured")
    if out is not None:
        screen.print(f"-> {out}")


COLUMNS = {
    "case": "left",
    "": "left",
    "median": "right",
    "±": "right",
    "tokens/s": "right",
    "× dense": "right",
    "× bitsandbytes": "right",
    "bound": "left",
}


def _rows(case: Case, judged: Sequence[Judged]) -> list[list[str]]:
    """A line for each candidate: median, half the interquartile range, ratios of the median, bounds."""
    from loftq.bench.bounds import DENSE, RIVAL
    from loftq.bench.units import amount

    def ratio(name: str, against: str) -> str:
        found = case.ratio(name, against)
        return "" if found is None else f"{found:.2f}"

    rows: list[list[str]] = []
    for name in case.values:
        spread = case.spread(name)
        bounds = [
            j.text for j in judged if (j.bound.suite, j.bound.case, j.bound.candidate) == (case.suite, case.name, name)
        ]
        rows.append(
            [
                "" if rows else case.name,
                name,
                amount(case.median(name), case.unit),
                "" if spread is None else f"{100 * spread:.0f} %",
                f"{case.tokens / case.median(name):.1f}" if case.tokens else "",
                ratio(name, DENSE),
                ratio(name, RIVAL),
                "\n".join(bounds),
            ]
        )
    return rows
