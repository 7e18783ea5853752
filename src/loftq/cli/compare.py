"""``loftq compare``"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loftq.cli import options, parse
from loftq.cli.follow import follow
from loftq.cli.quiet import quiet_transformers
from loftq.errors import ConfigError

if TYPE_CHECKING:
    from loftq.report.cells import Cell


def compare(
    model: options.Source,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results; an earlier run continues.")],
    methods: Annotated[str, typer.Option(help="Methods, with commas.")] = "qlora,loftq",
    bits: Annotated[str, typer.Option(help="Bits per weight, with commas; 2.5 mixes widths by layer.")] = "2,3,4",
    rank: Annotated[int, typer.Option("--rank", "-r", help="Rank of the adapters.")] = 32,
    calibration: Annotated[
        str | None,
        typer.Option(help="Text for the methods and the output error: a file, `pydoc`, FILE.safetensors:KEY."),
    ] = None,
    calibration_samples: options.CalibrationSamples = 128,
    calibration_length: options.CalibrationLength = 512,
    text: Annotated[str, typer.Option(help="Text to measure on: a file, `pydoc`, FILE.safetensors:KEY.")] = "pydoc",
    max_tokens: Annotated[int, typer.Option(help="Measure on the text's first tokens only.")] = 16384,
    window: options.Window = None,
    block_size: options.BlockSize = 64,
    refine_tokens: Annotated[int, typer.Option(help="Calibration tokens to refine all adapters jointly on.")] = 0,
    plans: Annotated[
        list[str] | None, typer.Option(help="BITS=FILE, the plan of loftq-data and auto at these bits; repeatable.")
    ] = None,
    seed: options.Seed = 0,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the quantized folders.")] = False,
    plots: Annotated[Path | None, typer.Option(help="Folder for pictures; needs matplotlib.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Quantize with several methods and bits, and measure errors, perplexity and KL against the original."""
    quiet_transformers()
    from loftq import compare as work
    from loftq.report.tables import console, print_json, table

    settings = work.Comparison(
        model=model,
        methods=parse.names("--methods", methods),
        bits=tuple(_number(value) for value in parse.names("--bits", bits)),
        rank=rank,
        block_size=block_size,
        seed=seed,
        calibration=calibration,
        calibration_samples=calibration_samples,
        calibration_length=calibration_length,
        text=text,
        max_tokens=max_tokens,
        window=window,
        refine_tokens=refine_tokens,
        plans=_plans(plans),
        keep=keep,
    )
    if plots is not None:
        from loftq.report.plots import require_matplotlib

        require_matplotlib()
    cells = follow(
        work.compare(settings, out, command=parse.this_command()),
        len(settings.methods) * len(settings.bits) + 1,
        _line,
        lambda cell: cell.method != work.FLOAT,
    )
    if plots is not None:
        from loftq.report.cells import RESULTS, read_rows
        from loftq.report.plots import plot_comparison

        for picture in plot_comparison(read_rows(out / RESULTS), plots, title=f"{Path(model).name}, rank {rank}"):
            typer.echo(f"-> {picture}", err=True)
    if json_output:
        print_json([cell.to_dict() for cell in cells])
        return
    console().print(table(dict.fromkeys(COLUMNS, "right") | {"method": "left", "": "left"}, [_row(c) for c in cells]))


COLUMNS = (
    "method",
    "bits",
    "bits/weight",
    "size",
    "adapter",
    "weight error",
    "output error",
    "perplexity",
    "KL",
    "s",
    "",
)


def _row(cell: Cell) -> list[str]:
    from loftq.report.tables import number, size

    def known(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    def measured(value: float | None, deviation: float | None) -> str:
        return "" if value is None else number(value) + ("" if deviation is None else f" ± {number(deviation)}")

    return [
        cell.method,
        f"{cell.bits:g}",
        known(cell.bpw, ".3f"),
        "" if cell.bytes is None else size(cell.bytes),
        size(cell.adapter_bytes) if cell.adapter_bytes else "",
        known(cell.weight_error, ".4f"),
        known(cell.output_error, ".4f"),
        measured(cell.perplexity, cell.perplexity_se),
        measured(cell.kl, cell.kl_se),
        known(cell.seconds, ".1f"),
        cell.error or "",
    ]


def _line(cell: Cell) -> str:
    name = f"{cell.method}, {cell.bits:g} bits"
    if cell.error:
        return f"{name}: {cell.error}"
    shown = {
        "perplexity": cell.perplexity,
        "KL": cell.kl,
        "output error": cell.output_error,
        "weight error": cell.weight_error,
    }
    return f"{name}: " + ", ".join(f"{what} {value:.4g}" for what, value in shown.items() if value is not None)


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"--bits has {value!r}, expected numbers with commas such as 2,2.5,4") from None


def _plans(values: list[str] | None) -> dict[float, Path]:
    result = {}
    for value in values or ():
        bits, equals, file = value.partition("=")
        if not equals or not Path(os.path.expanduser(file)).is_file():
            raise ConfigError(f"--plans is {value!r}, expected BITS=FILE such as 2.5=plan.json with a file that exists")
        result[_number(bits)] = Path(os.path.expanduser(file))
    return result
