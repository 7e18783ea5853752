"""Where an option counts, for verbs that do several things: what was given for another of them is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import typer

from loftq.errors import ConfigError

if TYPE_CHECKING:
    from loftq.data.prepare import DataSettings

# inspect
FOLDER, MEMORY, CONFIG = "a quantized folder", "--memory", "--config"
# evaluate
TEXT, TASK_DATA, HARNESS = "a text", "the data of a task (--task and --data)", "--lm-eval"
# train and ablate
NEW_ADAPTER, ADAPTER = "lora without a quantized folder", "methods with an adapter"
MEASURED = "evaluation data (--eval-data or --eval-split)"
WRITTEN, ROUGE = "metrics of written texts (exact_match, gsm8k, ROUGE)", "ROUGE"
PREDICTED = "metrics of predictions, which perplexity and loss are not"
TRAINING = "fine-tuning, which needs --task, --data and --eval-data"
PERPLEXITY = "a text (--text)"
# reproduce
EXPERIMENT = "a recipe that is run rather than listed"


def of_task(name: str) -> str:
    """What is the place of options for one task."""
    return f"the task {name}"


_SUMMARY = {"max_target_length": (of_task("summarization"),)}
_OF_TASKS = {
    "doc_stride": (of_task("qa"),),
    "prompt_template": (of_task("completion"), of_task("summarization")),
    "join_rows": (of_task("causal"),),
}
_QUANTIZER = (
    "bits",
    "rank",
    "codebook",
    "block_size",
    "scale_dtype",
    "double_quant",
    "published",
    "target_modules",
    "exclude_modules",
    "bits_pattern",
    "rank_pattern",
    "first_layers_bits",
    "quantize_embeddings",
    "plan",
    "adapter_dtype",
    "revision",
)
_FINE_TUNING = (
    "split",
    "eval_split",
    "map",
    "labels",
    "max_length",
    "epochs",
    "max_steps",
    "batch_size",
    "learning_rate",
    "limit",
    "eval_limit",
    "metrics",
    "seeds",
)
_OF_DATA = ("split", "map", "labels", "metrics", "max_length", "max_new_tokens", "num_beams", "rouge_stem")
_OF_RECIPE = ("dry_run", "out", "methods", "seeds", "model", "revision", "local", "file", "limit", "change")

OF_METRICS: dict[str, tuple[str, ...]] = {
    "max_new_tokens": (WRITTEN,),
    "num_beams": (WRITTEN,),
    "rouge_stem": (ROUGE,),
    "predictions": (PREDICTED,),
}
"""Option of ``evaluate`` -> what some of the chosen metrics must be of. A run keeps its own for what is measured later."""

COUNTS: dict[str, dict[str, tuple[str, ...]]] = {
    "inspect": {
        "check": (FOLDER,),
        **dict.fromkeys(_QUANTIZER, (CONFIG,)),
        **dict.fromkeys(("dtype", "batch_size", "length", "gradient_checkpointing", "device"), (MEMORY, CONFIG)),
    },
    "check": {**_SUMMARY, **_OF_TASKS},
    "train": {
        **_SUMMARY,
        **_OF_TASKS,
        **dict.fromkeys(("rank", "lora_alpha", "target_modules", "use_rslora"), (NEW_ADAPTER,)),
        "lora_dropout": (ADAPTER,),
        "eval_limit": (MEASURED,),
    },
    "evaluate": {
        **dict.fromkeys(("window", "stride", "max_tokens"), (TEXT,)),
        **dict.fromkeys(("adapter", "no_adapter"), (TEXT, HARNESS)),
        **dict.fromkeys(_OF_DATA, (TASK_DATA,)),
        **_OF_TASKS,
        **dict.fromkeys(("limit", "predictions"), (TASK_DATA, HARNESS)),
        **dict.fromkeys(("num_fewshot", "include_path"), (HARNESS,)),
    },
    "ablate": {
        **dict.fromkeys(_FINE_TUNING, (TRAINING,)),
        **dict.fromkeys(("window", "max_tokens"), (PERPLEXITY,)),
    },
    "reproduce": dict.fromkeys(_OF_RECIPE, (EXPERIMENT,)),
}
"""Verb -> option -> the uses of the verb in which it counts; those that are not listed always do."""


def refuse_strays(context: typer.Context, *uses: str) -> None:
    """Refuse an option that was given where it does not count.

    Args:
        uses: what the verb is used for.

    Raises:
        ConfigError: the first of them.
    """
    _refuse(context, COUNTS[str(context.command.name)], uses)


def refuse_unmeasured(context: typer.Context, task: str, metrics: Sequence[str]) -> None:
    """Refuse an option that was given for metrics of another kind than the chosen ones.

    Raises:
        ConfigError: the first of them, or a metric that the task does not know.
    """
    from loftq.evaluate import rouge
    from loftq.evaluate.task import check_metrics, makes_predictions, writes_texts

    chosen = check_metrics(task, metrics)
    uses = [WRITTEN] if writes_texts(task, chosen) else []
    uses += [PREDICTED] if makes_predictions(task, chosen) else []
    uses += [ROUGE] if set(chosen) & set(rouge.ROUGE) else []
    _refuse(context, OF_METRICS, uses)


def _refuse(context: typer.Context, places_of: Mapping[str, tuple[str, ...]], uses: Sequence[str]) -> None:
    for name, places in places_of.items():
        if _is_given(context, name) and not set(places) & set(uses):
            raise ConfigError(f"{_spelled(context, name)} is for {' or '.join(places)}; leave it out")


def refuse_split(context: typer.Context, name: str, data: DataSettings) -> None:
    """Refuse a split of a single file, which would be read whole whatever the split is called.

    Args:
        name: of the option. data: what the split is of.

    Raises:
        ConfigError: the split was given, and the data are one file.
    """
    if _is_given(context, name) and data.is_file:
        raise ConfigError(
            f"{_spelled(context, name)} is {context.params[name]}, but {data.data} is a single file without splits, expected "
            f"a folder of splits or a hub data set; leave it out, and name the file to use"
        )


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def _spelled(context: typer.Context, name: str) -> str:
    """An option as it is typed, such as ``--set`` or ``--no-rouge-stem``."""
    parameter = next(p for p in context.command.params if p.name == name)
    options = parameter.secondary_opts if context.params[name] is False else parameter.opts
    return next(option for option in options if option.startswith("--"))
