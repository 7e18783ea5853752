"""``loftq refine``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loftq.cli.parse import this_command
from loftq.cli.quiet import quiet_transformers


def refine(
    folder: Annotated[Path, typer.Argument(help="Folder that `loftq quantize` has written.")],
    text: Annotated[
        str, typer.Option(help="UTF-8 text file to tune on, or `pydoc` for English that every Python has.")
    ],
    source: Annotated[
        str | None,
        typer.Option(help="Full-precision model: folder, .gguf file or hub id.", show_default="as the report names it"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Another folder for the result.", show_default="in place of FOLDER")
    ] = None,
    stages: Annotated[
        str, typer.Option(help="`blocks` (one by one), `model` (all together), or both.")
    ] = "blocks,model",
    loss: Annotated[
        str, typer.Option(help="Of the stage `model`: `kl` (next-token distribution) or `rilq` (hidden state, text).")
    ] = "kl",
    samples: Annotated[int, typer.Option(help="Windows of the text.")] = 64,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a window.", show_default="512, or the model's positions if fewer")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the windows in the stage `model`.")] = 2,
    block_epochs: Annotated[int, typer.Option(help="Passes over the windows for each block.")] = 2,
    max_tokens: Annotated[
        int | None, typer.Option(help="Train the stage `model` on so many tokens at most.", show_default="all")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of one step, at least one window.")] = 512,
    lr: Annotated[float, typer.Option("--lr", help="Highest learning rate of the adapters.")] = 2e-4,
    scales: Annotated[
        bool, typer.Option("--scales", help="Tune the quantizer's scales too; the backbone is another one then.")
    ] = False,
    scales_lr: Annotated[float, typer.Option("--scales-lr", help="Highest learning rate of the scales.")] = 1e-3,
    holdout: Annotated[float, typer.Option(help="Share of the windows to judge by, never trained on.")] = 0.1,
    patience: Annotated[int, typer.Option(help="Evaluations without progress after which to stop.")] = 3,
    dtype: Annotated[str, typer.Option(help="Of the products: bfloat16, float32, or auto.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the windows and their order.")] = 0,
    resume: Annotated[bool, typer.Option(help="Continue an interrupted run, or start over.")] = True,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Tune the fitted adapter on a text until the model predicts what its full-precision source predicts.

    The result replaces the folder only if it is better on held-out windows of the text.
    """
    quiet_transformers()
    from loftq.refine import RefineSettings
    from loftq.refine import refine as run
    from loftq.report.tables import print_json

    settings = RefineSettings(
        stages=tuple(name.strip() for name in stages.split(",") if name.strip()),
        loss=loss,
        samples=samples,
        length=length,
        epochs=epochs,
        block_epochs=block_epochs,
        max_tokens=max_tokens,
        batch_tokens=batch_tokens,
        learning_rate=lr,
        scales_learning_rate=scales_lr,
        scales=scales,
        holdout=holdout,
        patience=patience,
        seed=seed,
        dtype=dtype,
    )
    report = run(folder, source, text=text, settings=settings, out=out, resume=resume, command=this_command())
    if json_output:
        print_json(report.to_dict())
        return
    what = "KL divergence" if report.metric == "kl" else "relative error of the last hidden state"
    for stage in report.stages:
        kept = "" if stage.kept else ", not kept"
        typer.echo(
            f"{stage.name}: held-out {what} {stage.before:.4g} → {stage.after:.4g}{kept} ({stage.tokens:,} tokens)"
        )
    if report.changed:
        typer.echo(f"{out or folder} is refined: {report.before:.4g} → {report.after:.4g} in {report.seconds:.1f} s")
    else:
        typer.echo(f"nothing was better on the held-out windows: the adapter in {out or folder} is as it was")
