"""``loftq export``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loftq.cli.quiet import quiet_transformers


def export(
    folder: Annotated[Path, typer.Argument(help="Run of `loftq train`, or quantized folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to create; absent or empty.")],
    adapter: Annotated[
        Path | None,
        typer.Option(help="Adapter to merge into a quantized folder, or the run; the fitted one by default."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "bfloat16",
) -> None:
    """Merge an adapter into the backbone it belongs to and save a dense checkpoint that loads anywhere."""
    quiet_transformers()
    from loftq.export.dense import export_dense

    typer.echo(f"merged model in {export_dense(folder, out, adapter=adapter, dtype=dtype)}")
