"""``loftq quickstart``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loftq.cli.quiet import quiet_transformers


def quickstart(
    model: Annotated[
        str | None,
        typer.Option(help="Any causal language model's folder or hub id.", show_default="SmolLM2-135M-Instruct"),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")] = Path("loftq-quickstart"),
    rank: Annotated[int, typer.Option("--rank", "-r", help="Rank of the adapters.", min=1)] = 64,
    max_tokens: Annotated[int, typer.Option(help="Tokens to evaluate on.", min=2)] = 2048,
    keep_all: Annotated[bool, typer.Option("--keep-all", help="Keep every quantized folder.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure full precision, QLoRA, published LoftQ and loftq on one model and print one table."""
    typer.echo("importing torch and transformers ...", err=True)
    quiet_transformers()
    from loftq import quickstart as work
    from loftq.report.tables import console, number, print_json, table

    lines = []
    results: dict[str, object] = {}
    for row, results in work.run(model, out, rank=rank, max_tokens=max_tokens, keep_all=keep_all):  # noqa: B007
        typer.echo(f"{row.label}: perplexity {number(row.perplexity)}", err=True)
        lines.append(work.cells(row))
    if json_output:
        print_json(results)
        return
    screen = console()
    screen.print(f"\n{results['model']}, adapters of rank {rank}, before any fine-tuning")
    screen.print(table(dict.fromkeys(work.COLUMNS, "right") | {"": "left"}, lines))
    screen.print(f"Results in {out / work.RESULTS}; the 2-bit model is in {out / work.KEPT}.\n")
    screen.print("Next, on a model of your own:")
    for command in work.next_commands():
        screen.print(f"  {command}", soft_wrap=True)
