"""``loftq evaluate``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loftq.cli import counts, options, parse
from loftq.cli.quiet import quiet_transformers
from loftq.errors import ConfigError

if TYPE_CHECKING:
    from loftq.data.prepare import DataSettings


_How = dict[str, Any]
"""What ``load_causal`` is told beside the model and its revision."""


def evaluate(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="Run of `loftq train`, quantized folder, or a model's folder or hub id.")
    ],
    text: Annotated[
        str | None,
        typer.Option(help="UTF-8 text file, or `pydoc` for English that every Python has.", show_default="pydoc"),
    ] = None,
    task: Annotated[str | None, typer.Option(help=parse.TASK_HELP, show_default="the run's")] = None,
    data: Annotated[str | None, typer.Option(help=parse.DATA_HELP, show_default="the run's evaluation data")] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of a folder or a hub data set.", show_default="validation")
    ] = None,
    map: options.Map = None,
    labels: options.Labels = None,
    metrics: Annotated[str | None, typer.Option(help="With commas.", show_default="the task's")] = None,
    lm_eval: Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness, with commas.")] = None,
    revision: options.Revision = None,
    init_from: options.InitFrom = None,
    adapter: options.Adapter = None,
    no_adapter: Annotated[bool, typer.Option("--no-adapter", help="Evaluate the backbone alone.")] = False,
    window: options.Window = None,
    stride: Annotated[int | None, typer.Option(help="How far the window advances.", show_default="the window")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Score only the text's first tokens.")] = None,
    max_length: options.MaxLength = None,
    doc_stride: options.DocStride = None,
    join_rows: options.JoinRows = False,
    prompt_template: Annotated[
        str | None, typer.Option(help="What a prompt is put into.", show_default="{prompt}")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a text that a metric needs.", show_default="the run's, or 256")
    ] = None,
    num_beams: Annotated[int | None, typer.Option(help="Beams of such a text.", show_default="the run's, or 1")] = None,
    rouge_stem: options.RougeStem = None,
    limit: options.Limit = None,
    num_fewshot: Annotated[int | None, typer.Option(help="For --lm-eval.", show_default="the task's")] = None,
    include_path: Annotated[Path | None, typer.Option(help="For --lm-eval: folder with tasks of your own.")] = None,
    predictions: Annotated[Path | None, typer.Option(help="File for the predictions, as JSONL.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Windows or examples at once.", show_default="the run's for a task, or 1")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16, or auto.", show_default="the run's, or auto")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Perplexity ± standard error on a text, the metrics of a task on its data, or lm-evaluation-harness."""
    quiet_transformers()
    from loftq.finetune.load import is_run

    asked = [n for n, given in (("--text", text), ("--task or --data", task or data), ("--lm-eval", lm_eval)) if given]
    how: _How = {"adapter": adapter, "use_adapter": not no_adapter, "dtype": dtype, "init_from": init_from}
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(asked)} were given together; give one")
    if lm_eval is not None:
        counts.refuse_strays(context, counts.HARNESS)
        chosen = {
            "limit": limit,
            "num_fewshot": num_fewshot,
            "batch_size": 1 if batch_size is None else batch_size,
            "include_path": include_path,
            "predictions": predictions,
        }
        _harness(model, revision, lm_eval, chosen, how, json_output)
    elif task or data or (is_run(model) and text is None):
        known = _known(model, task, data)
        counts.refuse_strays(context, counts.TASK_DATA, *([counts.of_task(known[0].task)] if known else []))
        chosen_metrics = parse.names("--metrics", metrics)
        if known is not None:
            counts.refuse_split(context, "split", known[0])
            if task in (None, known[0].task):
                counts.refuse_unmeasured(context, known[0].task, chosen_metrics or known[1])
        changes: dict[str, Any] = {
            "task": task,
            "data": data,
            "split": split,
            "map": parse.column_map(map) or None,
            "labels": parse.names("--labels", labels),
            "max_length": max_length,
            "doc_stride": doc_stride,
            "join_rows": join_rows or None,
            "prompt_template": prompt_template,
            "limit": limit,
        }
        decoding: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "rouge_stem": rouge_stem}
        decoding |= {"batch_size": batch_size, "revision": revision, "init_from": init_from}
        _task(model, changes, chosen_metrics, decoding, predictions, dtype, json_output)
    else:
        counts.refuse_strays(context, counts.TEXT)
        windows = {"window": window, "stride": stride, "batch_size": 1 if batch_size is None else batch_size}
        _text(model, revision, text or "pydoc", max_tokens, windows, how, json_output)


def _known(model: str, task: str | None, data: str | None) -> tuple[DataSettings, tuple[str, ...]] | None:
    """The data that a task is measured on and its metrics, as far as the options and the run, if it is one, say."""
    from loftq.data import tasks
    from loftq.data.prepare import DataSettings
    from loftq.finetune.load import is_run
    from loftq.finetune.record import TrainingRecord

    if not is_run(model):
        return None if task is None or data is None else (DataSettings(task, data), tasks.task(task).metrics)
    record = TrainingRecord.load(model)
    known = record.data_settings(model)
    return known if data is None else known.replace(data=data), record.train_settings.metric_names


def _task(
    model: str,
    changes: dict[str, Any],
    metrics: tuple[str, ...] | None,
    decoding: dict[str, Any],
    predictions: Path | None,
    dtype: str | None,
    json_output: bool,
) -> None:
    from loftq.checkpoint.writer import check_file
    from loftq.evaluate.predictions import write_predictions
    from loftq.evaluate.rouge import told
    from loftq.finetune.measure import evaluate_task
    from loftq.report.tables import print_json
    from loftq.report.training import print_metrics

    given = {name: value for name, value in changes.items() if value is not None}
    if predictions is not None:
        check_file(predictions, "the predictions")
    result, settings, notes = evaluate_task(model, given, metrics, dtype=dtype, **decoding)
    for note in notes:
        typer.echo(f"loftq: {note}", err=True)
    if predictions is not None:
        write_predictions(predictions, result.predictions)
    if json_output:
        rouge = {} if result.rouge is None else {"rouge": result.rouge}
        print_json({"model": model, "data": settings.to_dict(), "metrics": result.metrics, **rouge})
    else:
        print_metrics(result.metrics)
        if result.rouge is not None:
            typer.echo(told(result.rouge))


def _harness(
    model: str, revision: str | None, tasks: str, chosen: dict[str, Any], how: _How, json_output: bool
) -> None:
    from loftq.checkpoint.writer import check_file
    from loftq.evaluate.lm_eval import run_tasks
    from loftq.evaluate.models import load_tokenizer
    from loftq.finetune.load import load_causal
    from loftq.report.tables import print_json
    from loftq.report.training import print_harness

    if chosen["predictions"] is not None:
        check_file(chosen["predictions"], "the predictions")
    loaded = load_causal(model, revision=revision, **how)
    result = run_tasks(loaded, load_tokenizer(model, revision), list(parse.names("--lm-eval", tasks)), **chosen)
    if json_output:
        print_json({"model": model, **result})
    else:
        print_harness(result)


def _text(
    model: str,
    revision: str | None,
    text: str,
    max_tokens: int | None,
    windows: dict[str, Any],
    how: _How,
    json_output: bool,
) -> None:
    from loftq.evaluate.models import default_window, encode, load_tokenizer
    from loftq.evaluate.perplexity import perplexity
    from loftq.evaluate.text import read_text
    from loftq.finetune.load import load_causal
    from loftq.report.progress import bar
    from loftq.report.tables import print_json

    content = read_text(text)
    loaded = load_causal(model, revision=revision, **how)
    ids = encode(load_tokenizer(model, revision), content, max_tokens)
    windows["window"] = default_window(loaded, windows["window"])
    with bar(max(ids.numel() - 1, 1), "evaluating", "tokens") as advance:
        result = perplexity(loaded, ids, **windows, advance=advance)
    if json_output:
        print_json({"model": model, "text": text, **result.to_dict()})
    else:
        typer.echo(
            f"perplexity {result.perplexity:.4g} ± {result.standard_error:.2g} "
            f"({result.tokens} tokens, window {result.window}, stride {result.stride})"
        )
