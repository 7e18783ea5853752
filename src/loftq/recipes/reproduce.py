"""Running a recipe's steps and remembering what is done."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loftq.checkpoint.source import read_json
from loftq.checkpoint.writer import disk_errors, replace_text
from loftq.config import LoftQConfig
from loftq.data.prepare import DataSettings, check_rows
from loftq.errors import OutputError
from loftq.finetune.settings import TrainSettings
from loftq.recipes.comparison import Measurement
from loftq.recipes.dryrun import check_lengths
from loftq.recipes.recipe import Recipe
from loftq.recipes.steps import EVALUATE, QUANTIZE, TRAIN, Options, Step, plan_steps

RESULTS = "reproduce.json"
HUB_ROWS = 1000
"""Rows of a data set of the hub that are looked at before the first step."""

Runner = Callable[[Step, bool], Mapping[str, Any]]


def run_step(step: Step, progress: bool = True) -> Mapping[str, Any]:
    """Do one step and return what it reports; of an ``evaluate``, its metrics, ``examples``, their number, and
    ``rouge``, what ROUGE was taken with.

    Raises:
        LoftQError: what the step raises.
    """
    given = step.arguments
    if step.kind == QUANTIZE:
        from loftq.pipeline import quantize_checkpoint

        config = LoftQConfig.from_dict(given["config"])
        return quantize_checkpoint(
            given["source"],
            given["out"],
            config,
            revision=given["revision"],
            progress=progress,
            command=step.command,
        ).totals()
    if step.kind == TRAIN:
        from loftq.finetune.run import train

        return train(
            given["out"],
            TrainSettings.from_dict(given["settings"]),
            init_from=given["init_from"],
            model=given["model"],
            revision=given["revision"],
            progress=progress,
            command=step.command,
        ).to_dict()
    from loftq.evaluate.predictions import write_predictions
    from loftq.finetune.measure import evaluate_task

    result, _, _ = evaluate_task(
        given["run"], _given(given["data"]), given["metrics"], progress=progress, **given["options"]
    )
    if given["predictions"] is not None:
        write_predictions(given["predictions"], result.predictions)
    rouge = {} if result.rouge is None else {"rouge": result.rouge}
    return {**result.metrics, "examples": result.examples, **rouge}


def _given(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key == "limit" or value not in (None, [])}


def reproduce(
    recipe: Recipe, options: Options, *, run: Runner = run_step, progress: bool = True
) -> Iterator[tuple[Step, bool]]:
    """Do the steps of a recipe; yield each with whether it was done now. ``OUT/reproduce.json`` remembers them.

    A step that an earlier run of the same recipe with the same model, data and limit has finished is not done again.

    Raises:
        ConfigError: see :func:`loftq.recipes.steps.plan_steps`. OutputError: the folder holds something else.
        SourceError: data that cannot be read, or a row that does not fit.
    """
    steps = plan_steps(recipe, options)
    for step in steps:  # what training would refuse is said before hours of quantization
        if step.kind == TRAIN:
            TrainSettings.from_dict(step.arguments["settings"])
    done = _finished(options.out)
    left = [step for step in steps if step.name not in done]
    check_lengths(recipe, options, left)
    _check_data(left)
    state = _State(options.out, recipe, options)
    for step in steps:
        if step.name in state.done:
            yield step, False
            continue
        state.finish(step, run(step, progress))
        yield step, True


def _check_data(steps: Sequence[Step]) -> None:
    """What a training or a measurement would refuse is said before hours of quantization.

    Of the hub's rows the first ones are read, for they are read over the network each time.
    """
    given = [step.arguments["data"] for step in steps if step.kind == EVALUATE]
    given += [step.arguments["settings"]["data"] for step in steps if step.kind == TRAIN]
    for data in {json.dumps(data): data for data in given}.values():
        settings = DataSettings.from_dict(data)
        if not Path(settings.data).exists():
            settings = settings.replace(limit=min(settings.limit or HUB_ROWS, HUB_ROWS))
        check_rows(settings)


def _finished(folder: Path) -> list[str]:
    return read_json(folder / RESULTS).get("done", []) if (folder / RESULTS).exists() else []


def measurements(out: Path) -> list[Measurement]:
    """What the evaluations in a folder have measured; empty before the first."""
    file = out / RESULTS
    return [Measurement(**row) for row in read_json(file)["measured"]] if file.exists() else []


class _State:
    """Finished steps and measurements of a folder."""

    def __init__(self, folder: Path, recipe: Recipe, options: Options) -> None:
        local = {name: str(split.file) for name, split in options.local.items()}
        same = {"recipe": recipe.to_dict(), "model": options.model, "limit": options.limit, "local": local}
        same |= {"revision": options.revision}
        same = json.loads(json.dumps(same))
        self.file = folder / RESULTS
        self.values: dict[str, Any] = {**same, "done": [], "measured": []}
        with disk_errors(folder):
            if not self.file.exists():
                if folder.exists() and any(folder.iterdir()):
                    raise OutputError(
                        f"{folder} holds something else than a reproduction; choose another folder with --out"
                    )
                folder.mkdir(parents=True, exist_ok=True)
                self._write()
        known = read_json(self.file)
        different = [key for key in same if known.get(key) != same[key]]
        if different:
            raise OutputError(
                f"{folder} holds a reproduction with another {different[0]}; choose another folder with --out"
            )
        self.values = known

    @property
    def done(self) -> list[str]:
        return self.values["done"]

    def finish(self, step: Step, result: Mapping[str, Any]) -> None:
        if step.kind == EVALUATE:
            row = Measurement.from_result(step.method, step.seed, step.evaluation or "", result)
            self.values["measured"].append({k: v for k, v in asdict(row).items() if (k, v) != ("rouge", None)})
        self.values["done"].append(step.name)
        with disk_errors(self.file):
            self._write()

    def _write(self) -> None:
        replace_text(self.file, json.dumps(self.values, indent=1) + "\n")
