"""``loftq ablate``"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loftq.cli import counts, options, parse
from loftq.cli.follow import follow
from loftq.cli.quiet import quiet_transformers
from loftq.config import CODEBOOKS, METHODS, SCALE_DTYPES, SCALES, LoftQConfig
from loftq.errors import ConfigError

if TYPE_CHECKING:
    from loftq.ablate import Ablation, Row
    from loftq.finetune.settings import TrainSettings

_DEFAULT = LoftQConfig()


def ablate(
    context: typer.Context,
    model: options.Source,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the tables; an earlier run continues.")],
    iters: Annotated[str, typer.Option("--iters", help="Alternations T, with commas; 0 is QLoRA.")] = "5",
    rank: Annotated[str, typer.Option("--rank", "-r", help="Ranks of the adapters, with commas.")] = "16",
    bits: Annotated[
        str, typer.Option(help="Bits per weight, with commas; 2.5 mixes widths by layer, as the paper does.")
    ] = "4",
    codebook: Annotated[str, typer.Option(help=f"With commas: {', '.join(CODEBOOKS)}.")] = _DEFAULT.codebook,
    damping: Annotated[
        str, typer.Option(help="λ of calibrated methods, from 0 to 1, with commas; `default` is the method's own.")
    ] = "default",
    method: Annotated[
        str,
        typer.Option(
            help=f"With commas: {', '.join(METHODS)}; `default` is loftq-data with a calibration text, from 3 bits on "
            "loftq-data-zero, and loftq without one."
        ),
    ] = "default",
    calibration: Annotated[
        str, typer.Option(help="Texts, with commas: `none`, `pydoc`, `self`, files, FILE.safetensors:KEY.")
    ] = "none",
    grid: Annotated[
        bool, typer.Option("--grid", help="All combinations, rather than one factor at a time around the base.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            help="FACTOR=VALUE with commas, e.g. bits=2,iters=5.",
            show_default="quantize's defaults, or the largest T and the first of the rest",
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Text for perplexity before fine-tuning: a file, `pydoc`, FILE.safetensors:KEY."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Measure on the text's first tokens only.")] = 16384,
    window: options.Window = None,
    task: Annotated[
        str | None, typer.Option(help=f"Fine-tune every cell: {parse.TASK_HELP}", show_default="no training")
    ] = None,
    data: Annotated[str | None, typer.Option(help=f"To train on. {parse.DATA_HELP}")] = None,
    split: options.TrainSplit = "train",
    eval_data: options.EvalData = None,
    eval_split: options.EvalSplit = None,
    map: options.Map = None,
    labels: options.Labels = None,
    max_length: options.MaxLength = None,
    epochs: options.Epochs = 3.0,
    max_steps: options.MaxSteps = None,
    batch_size: options.BatchSize = 8,
    learning_rate: options.LearningRate = 1e-4,
    limit: options.Limit = None,
    eval_limit: options.EvalLimit = None,
    metrics: Annotated[
        str | None, typer.Option(help="With commas; the first is plotted.", show_default="the task's")
    ] = None,
    calibration_samples: options.CalibrationSamples = 128,
    calibration_length: options.CalibrationLength = 512,
    block_size: options.BlockSize = _DEFAULT.block_size,
    scale: Annotated[str, typer.Option(help=f"{', '.join(SCALES)}.")] = _DEFAULT.scale,
    scale_dtype: Annotated[str, typer.Option(help=f"{', '.join(SCALE_DTYPES)}.")] = _DEFAULT.scale_dtype,
    target_modules: options.TargetModules = None,
    seed: options.Seed = 0,
    seeds: Annotated[
        str | None,
        typer.Option(
            help="Of the trainings, with commas: mean ± standard deviation of each cell.", show_default="--seed"
        ),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the quantized folders and the runs.")] = False,
    plots: Annotated[
        bool | None, typer.Option("--plots/--no-plots", help="Pictures.", show_default="where matplotlib is installed")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Vary T, rank, bits, codebook, damping, method and calibration, and measure what each does."""
    quiet_transformers()
    from loftq.ablate import Ablation, Sweep
    from loftq.ablate import ablate as cells
    from loftq.ablate.run import label
    from loftq.report.plots import require_matplotlib
    from loftq.report.tables import print_json

    uses = [counts.TRAINING] if task is not None or data is not None or eval_data is not None else []
    counts.refuse_strays(context, *uses, *([counts.PERPLEXITY] if text is not None else []))
    given = {
        "iters": iters,
        "rank": rank,
        "bits": bits,
        "codebook": codebook,
        "damping": damping,
        "method": method,
        "calibration": calibration,
    }
    settings = Ablation(
        model=model,
        sweep=Sweep(
            **{n: tuple(_value(n, part) for part in parse.names(f"--{n}", v)) for n, v in given.items()},
            grid=grid,
            base=_base(base),
        ),
        text=text,
        max_tokens=max_tokens,
        window=window,
        train=_training(
            context,
            task,
            data,
            eval_data,
            split=split,
            eval_split=eval_split,
            limit=limit,
            eval_limit=eval_limit,
            prepared={
                "map": parse.column_map(map),
                "labels": parse.names("--labels", labels) or (),
                "max_length": max_length,
            },
            epochs=epochs,
            max_steps=max_steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            metrics=parse.names("--metrics", metrics),
            seed=seed,
        ),
        block_size=block_size,
        scale=scale,
        scale_dtype=scale_dtype,
        target_modules=parse.module_patterns(["all-linear"] if target_modules is None else target_modules) or (),
        calibration_samples=calibration_samples,
        calibration_length=calibration_length,
        seed=seed,
        seeds=() if seeds is None else parse.seeds(seeds),
        keep=keep,
    )
    if plots:
        require_matplotlib()

    def say(sentence: str) -> None:
        typer.echo(f"loftq: {sentence}", err=True)

    total = len(set(settings.cells().values())) + (text is not None)
    rows = follow(
        cells(settings, out, command=parse.this_command(), notice=say),
        total,
        lambda row: f"{label(row.factors)}: {_line(row, settings)}",
        lambda row: row.factors.method != "float",
    )
    if plots is not False:
        _draw(out, settings, say)
    say(f"-> {out / 'ablation.csv'}, {out / 'modules.csv'}")
    if json_output:
        print_json([row.to_dict() for row in rows])
    else:
        _print(rows, settings)


def _draw(out: Path, settings: Ablation, say: Callable[[str], None]) -> None:
    from loftq.ablate.plots import plot_sweep
    from loftq.report.plots import require_matplotlib

    try:
        require_matplotlib()
    except ConfigError as error:
        say(str(error))
        return
    for picture in plot_sweep(out, settings):
        say(f"-> {picture}")


_TYPES: dict[str, tuple[Callable[[str], Any], str]] = {
    "iters": (int, "whole numbers"),
    "rank": (int, "whole numbers"),
    "bits": (float, "numbers"),
    "damping": (float, "numbers"),
}


def _value(name: str, value: str) -> Any:
    """A factor's value from its spelling on the command line."""
    if (name, value) in (("damping", "default"), ("method", "default"), ("calibration", "none")):
        return None
    kind, expected = _TYPES.get(name, (str, ""))
    try:
        number = kind(value)
    except ValueError:
        example = {"iters": "0,1,5", "rank": "8,16", "bits": "2,2.5,4", "damping": "0,0.01,0.1"}[name]
        raise ConfigError(f"--{name} has {value!r}, expected {expected} with commas such as {example}") from None
    return int(number) if name == "bits" and number.is_integer() else number


def _base(value: str | None) -> dict[str, Any]:
    found = {}
    for part in parse.names("--base", value) or ():
        name, equals, text = part.partition("=")
        if not equals or not text:
            raise ConfigError(f"--base has {part!r}, expected FACTOR=VALUE such as bits=2")
        found[name] = _value(name, text)
    return found


def _training(
    context: typer.Context,
    task: str | None,
    data: str | None,
    eval_data: str | None,
    *,
    split: str,
    eval_split: str | None,
    limit: int | None,
    eval_limit: int | None,
    prepared: dict[str, Any],
    **options: Any,
) -> TrainSettings | None:
    from loftq.data.prepare import DataSettings
    from loftq.finetune.settings import TrainSettings

    if task is None and data is None and eval_data is None:
        return None
    if task is None or data is None:
        missing = "--task" if task is None else "--data"
        raise ConfigError(f"fine-tuning needs --task and --data, but {missing} is missing; add it")
    source = DataSettings(task=task, data=data, split=split, limit=limit, **prepared)
    counts.refuse_split(context, "split", source)
    held = None
    if eval_data is not None or eval_split is not None:
        held = source.replace(data=eval_data or data, split=eval_split or "validation", limit=eval_limit)
        counts.refuse_split(context, "eval_split", held)
    return TrainSettings(data=source, eval_data=held, **options)


def _measured(settings: Ablation) -> dict[str, str]:
    """Column -> heading of what the sweep measures."""
    from loftq.ablate.table import AFTER, BEFORE

    shown = {"frobenius_relative": "‖E‖F / ‖W‖F", "spectral_relative": "‖E‖₂ / ‖W‖₂"}
    if settings.text is not None:
        shown["perplexity"] = "perplexity"
    for name in settings.train.metric_names if settings.train is not None else ():
        shown |= {f"{BEFORE}{name}": f"{name} before", f"{AFTER}{name}": f"{name} after"}
    return shown


def _with_spread(row: Row, name: str, number: Callable[[float], str]) -> str:
    from loftq.ablate.table import SPREAD

    value, spread = row.value(name), row.metrics.get(f"{name}{SPREAD}")
    return "" if value is None else number(value) + ("" if spread is None else f" ± {spread:.2g}")


def _line(row: Row, settings: Ablation) -> str:
    if row.error:
        return row.error
    known = {heading: _with_spread(row, name, "{:.4g}".format) for name, heading in _measured(settings).items()}
    return ", ".join(f"{heading} {value}" for heading, value in known.items() if value)


def _print(rows: list[Row], settings: Ablation) -> None:
    """The factors that vary and what was measured; E = W - Q - scaling · B A."""
    from loftq.ablate.factors import FACTORS
    from loftq.report.tables import console, number, table

    cells = [row.factors for row in rows if row.factors.method != "float"]
    varying = [n for n in FACTORS if n == "method" or len({getattr(cell, n) for cell in cells}) > 1]
    measured = _measured(settings)

    def factor(value: object) -> str:
        return "" if value is None else f"{value:g}" if isinstance(value, float) else Path(f"{value}").name

    lines = []
    for row in rows:
        cells_of = [factor(getattr(row.factors, name)) for name in varying]
        values = [_with_spread(row, name, number) for name in measured]
        lines.append([*cells_of, *values, "" if row.seconds is None else f"{row.seconds:.1f}", row.error or ""])
    columns = {**dict.fromkeys(varying, "left"), **dict.fromkeys([*measured.values(), "s"], "right"), "": "left"}
    console().print(table(columns, lines))
