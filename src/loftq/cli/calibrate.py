"""``loftq calibrate``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loftq.cli import options, parse
from loftq.cli.quiet import quiet_transformers


def calibrate(
    model: options.Source,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write the statistics to.")],
    calibration: Annotated[
        str, typer.Option(help="UTF-8 or JSONL file, hub dataset, pydoc, self, or FILE.safetensors:KEY with token ids.")
    ] = "pydoc",
    samples: Annotated[int, typer.Option("--calibration-samples", help="Windows of text.")] = 128,
    length: Annotated[int, typer.Option("--calibration-length", help="Tokens of a window.")] = 512,
    gradients: Annotated[
        int,
        typer.Option("--calibration-gradients", help="Windows to run a backward pass on, for loftq-data; 0 for none."),
    ] = 32,
    fisher: Annotated[
        bool, typer.Option("--fisher", help="The diagonal Fisher information as well, for lq-lora.")
    ] = False,
    diagonal: Annotated[bool, typer.Option("--diagonal", help="E[x²] only, instead of E[x xᵀ].")] = False,
    target_modules: options.TargetModules = None,
    seed: Annotated[int, typer.Option(help="Seed of text that the model writes itself.")] = 0,
    revision: options.Revision = None,
) -> None:
    """Collect the statistics of every layer's inputs once, for `loftq quantize --statistics` and `loftq plan`."""
    quiet_transformers()
    from loftq.calibrate.choose import collect_statistics
    from loftq.checkpoint.writer import check_file
    from loftq.config import LoftQConfig
    from loftq.errors import ConfigError

    targets = parse.module_patterns(["all-linear"] if target_modules is None else target_modules) or ()
    if diagonal and fisher:
        raise ConfigError("--diagonal and --fisher were both given, expected one: gradients come with full moments")
    config = LoftQConfig(
        target_modules=targets,
        calibration=calibration,
        calibration_samples=samples,
        calibration_length=length,
        calibration_gradients=gradients,
        seed=seed,
    )
    check_file(out, "the statistics")
    statistics = collect_statistics(model, config, full=not diagonal, fisher=fisher, revision=revision)
    statistics.save(out)
    typer.echo(f"statistics of the inputs of {len(statistics)} layers in {out}")
