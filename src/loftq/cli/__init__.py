"""The command line: one module a verb. What a verb needs is imported when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import os
import sys
import time

import typer

from loftq.cli.ablate import ablate
from loftq.cli.bench import bench
from loftq.cli.calibrate import calibrate
from loftq.cli.compare import compare
from loftq.cli.data import data
from loftq.cli.evaluate import evaluate
from loftq.cli.export import export
from loftq.cli.generate import generate
from loftq.cli.inspect import inspect
from loftq.cli.plan import plan
from loftq.cli.quantize import quantize
from loftq.cli.quickstart import quickstart
from loftq.cli.quiet import quiet_libraries
from loftq.cli.refine import refine
from loftq.cli.reproduce import reproduce
from loftq.cli.train import train
from loftq.errors import LoftQError

app = typer.Typer(
    name="loftq",
    help="Turn a pretrained model into a packed k-bit backbone and a LoRA adapter that together start where it was.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _verb in (
    quickstart,
    quantize,
    calibrate,
    plan,
    refine,
    train,
    inspect,
    evaluate,
    compare,
    ablate,
    reproduce,
    generate,
    export,
    bench,
):
    app.command()(_verb)
app.add_typer(data, name="data")


def _version(show: bool) -> None:
    if show:
        from loftq import __version__

        typer.echo(f"loftq {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", help="Show the version.", callback=_version, is_eager=True),
) -> None:
    pass


def main() -> None:
    """Entry point: a user's mistake is one sentence on stderr and exit code 2."""
    quiet_libraries()
    try:
        app()
    except LoftQError as error:
        if int(os.environ.get("RANK") or 0) > 0:
            time.sleep(30)  # the first of several processes says it for all, and the launcher then ends the others
        typer.echo(f"loftq: {error}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != 130:  # what Typer makes of an interrupt inside a command
            raise
        typer.echo("loftq: interrupted; unfinished work continues when the command is run again", err=True)
        sys.exit(130)
