"""Options that several verbs share, as types of their parameters."""

from __future__ import annotations

from typing import Annotated

import typer

from loftq.cli import parse

Map = Annotated[list[str] | None, typer.Option("--map", help=parse.MAP_HELP)]
Labels = Annotated[
    str | None, typer.Option(help="Classes in the order of their numbers.", show_default="from the data")
]
MaxLength = Annotated[int | None, typer.Option(help="Tokens of an input.", show_default="the task's usual")]
MaxTargetLength = Annotated[int, typer.Option(help="Tokens of a summary.")]
DocStride = Annotated[
    int | None, typer.Option(help="Tokens that neighbouring windows of a context share.", show_default="128")
]
Packing = Annotated[
    bool | None,
    typer.Option("--packing/--no-packing", help="Several texts to a window.", show_default="causal only"),
]
PromptTemplate = Annotated[str, typer.Option(help="What a prompt is put into.")]
