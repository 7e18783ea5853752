"""A training run from its settings to a folder with the result."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loftq.checkpoint.writer import disk_errors
from loftq.errors import LoftQError
from loftq.evaluate.models import is_quantized
from loftq.finetune import processes
from loftq.finetune.folder import begin_run, finished_run, forget_run_without_result, locked
from loftq.finetune.model import Start, find_start
from loftq.finetune.places import places_of
from loftq.finetune.record import TrainingRecord
from loftq.finetune.settings import TrainSettings
from loftq.finetune.training import Training
from loftq.report.record import QuantizationReport

IN_FOLDER = "finetuned"
"""Where a run goes that trains a quantized folder in its own place."""


def train(
    out: str | Path,
    settings: TrainSettings,
    *,
    init_from: str | Path | None = None,
    model: str | None = None,
    revision: str | None = None,
    resume: bool = True,
    progress: bool = True,
    command: str | None = None,
    notice: Callable[[str], None] = lambda sentence: None,
) -> TrainingRecord:
    """Train, measure, and write the result with its record ``training.json``.

    Args:
        out: folder of the run: absent, empty, or an interrupted run to continue. Or a quantized folder, where no other is
            named: it is trained, and the run goes into its subfolder ``finetuned``.
        init_from: the quantized folder that is trained, or, for ``lora``, whose adapter settings hold. One folder serves
            any number of runs.
        model: the full-precision model for ``lora`` and ``full``; by default the source of ``init_from``.
        revision: of ``model``, a hub id; by default its main branch.
        resume: continue an interrupted run of the same settings; otherwise start over.
        progress: a bar on a terminal, a plain line now and then elsewhere, and a line for each measurement.
        command: for the record. notice: takes sentences that a user should read.

    Returns:
        The record, whose ``status`` says whether the run ended early or diverged; its result is the best checkpoint, or the
        last good one.

    Raises:
        SourceError: a model or data that cannot be used, by file and line. ConfigError: settings that do not fit.
        OutputError: a folder that holds something else.
    """
    run = Path(os.path.expanduser(out))
    with disk_errors(run):  # its name alone may be too long
        if init_from is None and is_quantized(run):
            init_from, run = run, run / IN_FOLDER
    start = find_start(settings.method, init_from, model, revision)
    processes.check_batch(settings.batch_size)
    started = _started(run, settings, start)
    with processes.connected():
        if processes.is_main():
            return _lead(run, settings, start, started, resume, progress, command, notice)
        return _follow(run, settings, start, command)


def _started(run: Path, settings: TrainSettings, start: Start) -> dict[str, Any]:
    """What a run is recognised by when it is continued."""
    folder = None if start.folder is None else str(start.folder)
    held = None if settings.eval_data is None else settings.eval_data.data
    known: dict[str, Any] = {"settings": settings.to_dict(), "base": start.base, "folder": folder}
    known |= {} if start.revision is None else {"revision": start.revision}
    known |= {} if folder is None else {"backbone_sha256": QuantizationReport.load(Path(folder)).backbone_sha256}
    known["places"] = places_of(run, [start.base, folder, settings.data.data, held])
    return json.loads(json.dumps(known))


def _follow(run: Path, settings: TrainSettings, start: Start, command: str | None) -> TrainingRecord:
    """What a process does that writes and says nothing."""
    if processes.agreed(False):
        return TrainingRecord.load(run)
    return Training(run, settings, start, {}, command, lambda sentence: None).run(False, processes.wait)


def _lead(
    run: Path,
    settings: TrainSettings,
    start: Start,
    started: dict[str, Any],
    resume: bool,
    progress: bool,
    command: str | None,
    notice: Callable[[str], None],
) -> TrainingRecord:
    """What the main process does, or the only one."""
    with locked(run) as is_new:
        with disk_errors(run):
            finished = finished_run(run, started, resume)
        if processes.agreed(finished is not None):
            assert finished is not None
            return finished

        def begin() -> None:
            begin_run(run, started, resume)
            processes.wait()

        try:
            return Training(run, settings, start, started["places"], command, notice).run(progress, begin)
        except LoftQError:
            # a mistake in the data or the settings is no run: the corrected command may have this folder
            forget_run_without_result(run)
            if is_new and [p.name for p in run.iterdir()] == [".lock"]:
                shutil.rmtree(run)
            raise
