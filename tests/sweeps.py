"""Running ``loftq ablate`` by its command line, and reading its tables."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from loftq.cli.ablate import ablate as verb


def invoke(*arguments: object) -> Any:
    app = typer.Typer()
    app.command()(verb)
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))
