"""Measuring a trained model on the data of a task, apart from its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loftq.config import is_bool, one_of, positive_int
from loftq.data.prepare import DataSettings, prepare, tokenizer_for
from loftq.data.tasks import task
from loftq.errors import ConfigError, SourceError
from loftq.evaluate.models import check_exists, load_config
from loftq.evaluate.task import Measurement, check_classes, check_metrics, measure
from loftq.finetune.load import is_run, load_for_task, load_run, refuse_start_of_no_run
from loftq.finetune.record import TrainingRecord
from loftq.finetune.settings import DTYPES
from loftq.report.progress import bar


def evaluate_task(
    model: str,
    changes: Mapping[str, Any],
    metrics: Sequence[str] | None = None,
    *,
    dtype: str | None = None,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    num_beams: int | None = None,
    rouge_stem: bool | None = None,
    revision: str | None = None,
    init_from: str | Path | None = None,
    progress: bool = True,
) -> tuple[Measurement, DataSettings, list[str]]:
    """Measure a run of ``loftq train``, or another model that has the task's head.

    Args:
        model: the run's folder; a quantized folder; or a model's folder or hub id.
        changes: fields of :class:`DataSettings`. A run knows its task and its evaluation data, so none is needed.
        metrics: ``None`` for the run's, or the task's own.
        dtype: ``None`` for the run's, or ``auto``. batch_size: examples at once; ``None`` for the run's, or 1.
        max_new_tokens, num_beams: of texts that a metric needs; ``None`` for the run's, or 256 and 1.
        revision: of ``model``, a hub id; by default its main branch. init_from: where a run's model is now, if it was moved.
        rouge_stem: ROUGE compares Porter's stems of words; ``None`` for the run's, or yes.

    Returns:
        The measurement, what it was taken on, and a sentence for each thing that happened to rows, or was trained on.

    Raises:
        SourceError: a model or data that cannot be used. ConfigError: settings that do not fit.
    """
    asked = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "num_beams": num_beams}
    given: dict[str, Any] = {name: positive_int(name, value) for name, value in asked.items() if value is not None}
    usual: dict[str, Any] = {"batch_size": 1, "max_new_tokens": 256, "num_beams": 1, "rouge_stem": True}
    if rouge_stem is not None:
        given["rouge_stem"] = is_bool("rouge_stem", rouge_stem)
    if dtype is not None:
        one_of("dtype", dtype, DTYPES)
    labels: list[str] | None = None
    notes: list[str] = []
    check_exists(model, revision)
    refuse_start_of_no_run(model, init_from)
    if is_run(model):
        record = TrainingRecord.load(model)
        settings = _settings_of(model, record, changes)
        # before the model is loaded, so that a mistake costs no time
        chosen = check_metrics(settings.task, record.train_settings.metric_names if metrics is None else metrics)
        check_classes(chosen, record.labels)
        loaded, record = load_run(model, dtype=dtype, init_from=init_from)
        labels = record.labels
        trained = record.train_settings
        usual = {"max_new_tokens": trained.max_new_tokens, "num_beams": trained.num_beams}
        usual["rouge_stem"] = trained.rouge_stem
        usual["batch_size"] = trained.eval_batch_size or trained.batch_size
        notes = [
            f"{n}; name other data with --data"
            for n in settings.notice_of_training_on(record.located(model, trained.data))
        ]
    else:
        if "task" not in changes or "data" not in changes:
            raise ConfigError(f"{model} is no run of `loftq train`, expected --task and --data to measure it on")
        settings = DataSettings(**{"split": "validation", **changes}).to_measure()
        chosen = check_metrics(settings.task, task(settings.task).metrics if metrics is None else metrics)
        labels = list(settings.labels) or _labels_of(model, revision) if settings.task == "classification" else None
        check_classes(chosen, labels)
        loaded = load_for_task(model, settings.task, labels, dtype or "auto", revision)
    tokenizer = tokenizer_for(model, settings, revision=revision)
    examples, labels = prepare(settings, tokenizer, loaded.config, labels=labels)
    check_classes(chosen, labels)  # of a model that does not name them
    with bar(len(examples), "measuring", "examples", show=progress) as advance:
        result = measure(
            loaded,
            tokenizer,
            examples,
            chosen,
            labels=labels,
            advance=advance,
            **{**usual, **given},
        )
    return result, settings, [*examples.notes(), *notes]


def _settings_of(run: str, record: TrainingRecord, changes: Mapping[str, Any]) -> DataSettings:
    """The run's evaluation data, or its training data elsewhere, with what is asked for instead."""
    known = record.data_settings(run)
    if changes.get("task", known.task) != known.task:
        raise ConfigError(f"the run was trained for {known.task}, expected no other --task than that")
    labels = list(changes.get("labels") or ())
    if labels and record.labels and labels != record.labels:
        raise ConfigError(
            f"labels is {', '.join(labels)}, but the run was trained for the classes {', '.join(record.labels)} in this order; "
            f"leave --labels out"
        )
    if record.train_settings.eval_data is None and "data" not in changes:
        raise ConfigError("the run had nothing to measure on; say what with --data")
    changes = dict(changes)
    if "data" in changes:
        # a file has no split that other data could be asked for, and that of the training is not for measuring
        kept = {} if record.train_settings.eval_data is not None and not known.is_file else {"split": "validation"}
        changes = {"limit": None, **kept, **changes}
    return known.replace(**changes).to_measure()


def _labels_of(model: str, revision: str | None) -> list[str] | None:
    """The classes that a model's config names; ``None`` where it only counts them."""
    try:
        config = load_config(model, revision)
    except SourceError:  # said where the model is loaded
        return None
    names = [str(config.id2label[i]) for i in sorted(config.id2label)] if config.id2label else []
    return [n.removeprefix("LABEL_") for n in names] if all(n.startswith("LABEL_") for n in names) else names
