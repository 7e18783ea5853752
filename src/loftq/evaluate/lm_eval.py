"""Tasks of lm-evaluation-harness (Gao et al., doi:10.5281/zenodo.5371628) on a loaded model, packed or not.

The harness asks the model itself for log-likelihoods and continuations, so that its scores compare with published ones. Its
tasks' data come from the hub. A task of one's own is a YAML file whose data may be local:

    task: my_questions
    dataset_path: json
    dataset_kwargs: {data_files: {test: /data/questions.jsonl}}
    test_split: test
    output_type: multiple_choice
    doc_to_text: "{{question}}"
    doc_to_choice: "{{choices}}"
    doc_to_target: "{{answer}}"
    metric_list: [{metric: acc}]

A task's file may name Python functions beside it, which run: use only files that you trust.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import io
import logging
import math
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from loftq.config import positive_int
from loftq.errors import ConfigError, SourceError, first_line
from loftq.evaluate.generation import check_writes
from loftq.evaluate.models import eval_mode
from loftq.evaluate.predictions import Prediction, write_predictions
from loftq.optional import optional_module

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def run_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    include_path: str | Path | None = None,
    predictions: str | Path | None = None,
) -> dict[str, Any]:
    """Scores of tasks and groups of tasks, by name.

    Args:
        model: causal language model or encoder-decoder, with or without an adapter; in eval mode for the duration.
        tokenizer: the model's; left as it is.
        tasks: the harness's names, or names of tasks in ``include_path``.
        limit: use the first questions of each task only.
        num_fewshot: solved examples before each question; by default the task's own number, or none. A task that says 0
            itself keeps it.
        batch_size: questions at a time.
        seed: of Python's, numpy's and torch's random numbers, and of the choice of examples; for the choice, the harness's
            own default is 1234.
        include_path: folder of YAML files of tasks; one of them replaces the harness's task of the same name.
        predictions: file for what the model answered, as :mod:`loftq.evaluate.predictions` describes it: ``id`` is
            ``task/number``, ``prediction`` a text, or the log-likelihoods of the choices each with whether it is what the model
            would write, and ``score`` that of the first metric that is a number for one question.

    Returns:
        As JSON can hold it::

            {"lm_eval": version, "limit": …, "batch_size": …, "seed": …,
             "tasks": {name: {"version": …, "num_fewshot": …, "samples": questions,
                              "metrics": {"acc": {"value": …, "stderr": …, "higher_is_better": true}}}}}

        in the harness's units: shares from 0 to 1, not percent. A metric on filtered answers is called
        ``metric,filter``. ``None`` stands for what the harness has no number for.

    Raises:
        ConfigError: no such task or folder, a task that runs generated code or needs images, more examples than a task
            has, a model that predicts no tokens, or without the package lm_eval.
        SourceError: a task's file or data do not load. OutputError: the predictions cannot be written.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    positive_int("batch_size", batch_size)
    if limit is not None:
        positive_int("limit", limit)
    if num_fewshot is not None:
        positive_int("num_fewshot", num_fewshot, 0)
    if not names:
        raise ConfigError("no tasks were given, expected names such as arc_easy")
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"include_path is {include_path}, which is no folder, expected one with YAML files of tasks")
    check_writes(model)
    with _quiet(), eval_mode(model):
        loaded = _load(names, include_path)
        _configure(loaded["tasks"], num_fewshot, seed)
        # a copy of the tokenizer, which is given a padding token and side
        wrapped = _harness("lm_eval.models.huggingface").HFLM(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size
        )
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        # not `simple_evaluate`: it lists the machine's packages and programs, which takes seconds, and asks git
        found = _harness("lm_eval.evaluator").evaluate(
            lm=wrapped, task_dict=loaded, limit=limit, log_samples=predictions is not None
        )
    if predictions is not None:
        write_predictions(predictions, _answered(found["samples"]))
    return {
        "lm_eval": _harness("lm_eval").__version__,
        "limit": limit,
        "batch_size": batch_size,
        "seed": seed,
        "tasks": {name: _task(name, values, found) for name, values in found["results"].items() if _metrics(values)},
    }


def _harness(module: str) -> Any:
    return optional_module(module, "an lm-evaluation-harness task", "lm_eval", "lm-eval")


def _load(names: list[str], include_path: str | Path | None) -> dict[str, Any]:
    manager = _manager(names, include_path)
    try:
        return manager.load(names)
    except Exception as error:  # whatever a task's file, its functions and the library that fetches its data raise
        raise SourceError(
            f"{', '.join(names)} cannot be loaded ({first_line(error)}); check the task's file, and that its data are here "
            f"or can be downloaded"
        ) from None


def _manager(names: list[str], include_path: str | Path | None) -> Any:
    """What knows the tasks of these names."""
    manager_class = _harness("lm_eval.tasks").TaskManager
    paths = [] if include_path is None else [str(include_path)]
    # The harness's own tasks are some 15,000 files, which take seconds to list.
    manager = manager_class(include_path=paths, include_defaults=False)
    if not set(names) <= set(manager.all_subtasks):
        manager = manager_class(include_path=paths)
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        hints = []
        for name in unknown:
            close = difflib.get_close_matches(name, manager.all_tasks, 3)
            hints.append(repr(name) + (f" (did you mean {' or '.join(close)}?)" if close else ""))
        raise ConfigError(
            f"lm-evaluation-harness has no task {', '.join(hints)}, expected names that `lm_eval ls tasks` lists or tasks "
            f"of your own"
        )
    return manager


def _configure(tasks: dict[str, Any], num_fewshot: int | None, seed: int) -> None:
    """The number of examples and the seed of their choice, by the rules of the harness's ``simple_evaluate``."""
    for name, task in tasks.items():
        for flag, what in (("UNSAFE_CODE", "runs code that the model writes"), ("MULTIMODAL", "shows images or sound")):
            if getattr(task, flag, False):
                raise ConfigError(f"the task {name} {what}, which is not done here; choose another")
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
            _check_examples(name, task, num_fewshot or 0)
        task.set_fewshot_seed(seed=seed)


def _check_examples(name: str, task: Any, number: int) -> None:
    sampler = getattr(task, "sampler", None)
    if sampler is None or number == 0:
        return
    # the default one draws one more, which takes the question's place should that be among them
    spare = type(sampler) is _harness("lm_eval.api.samplers").ContextSampler
    most = len(sampler.df) - spare
    if number > most:
        raise ConfigError(
            f"num_fewshot is {number}, expected at most {most}, since {name} has no more examples to show"
        )


def _metrics(values: dict[str, Any]) -> list[tuple[str, str]]:
    """(metric, filter) of a task's results."""
    pairs = [tuple(key.split(",", 1)) for key in values if "," in key]
    return [(metric, rest) for metric, rest in pairs if not metric.endswith("_stderr")]


def _task(name: str, values: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    better = found["higher_is_better"].get(name, {})
    return {
        "version": found["versions"].get(name),
        "num_fewshot": found["n-shot"].get(name),
        "samples": values.get("sample_len"),
        "metrics": {
            metric if rest == "none" else f"{metric},{rest}": {
                "value": _number(values[f"{metric},{rest}"]),
                "stderr": _number(values.get(f"{metric}_stderr,{rest}")),
                "higher_is_better": better.get(metric),
            }
            for metric, rest in _metrics(values)
        },
    }


def _answered(samples: dict[str, list[dict[str, Any]]]) -> Iterator[Prediction]:
    """A row a question; of several filters of an answer, the first."""
    for task, rows in samples.items():
        seen = set()
        for row in sorted(rows, key=lambda row: row["doc_id"]):
            if row["doc_id"] in seen:
                continue
            seen.add(row["doc_id"])
            answers = row["filtered_resps"]
            scores = [row[name] for name in row["metrics"] if isinstance(row.get(name), (bool, int, float))]
            yield Prediction(
                f"{task}/{row['doc_id']}",
                str(row["arguments"][0][0]),
                answers[0] if len(answers) == 1 else answers,
                row["target"],
                float(scores[0]) if scores else None,
            )


def _number(value: Any) -> float | None:
    """``None`` for "N/A", NaN and whatever else is no number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """None of the harness's notices; its progress bars only on a terminal."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
