"""The whole of a refinement: from a quantized folder and its source to the folder with better adapters."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loftq.checkpoint.source import Source
from loftq.errors import ConfigError
from loftq.hub.backbone import read_quantization_config
from loftq.refine.blocks import BlockStage
from loftq.refine.folder import finish_move, write_refined
from loftq.refine.layers import Adapted, AdaptedLinear
from loftq.refine.model import Distance, ModelStage
from loftq.refine.optimizer import put_back, snapshot
from loftq.refine.record import RefinementReport, StageRecord
from loftq.refine.settings import RefineSettings
from loftq.refine.state import SavedState
from loftq.refine.student import (
    dtype_name,
    load_student,
    new_tensors,
    output_layer,
    round_factors,
    trainable,
    weight_errors,
)
from loftq.refine.teacher import checked_source, is_causal, load_dense, output_head, teacher_states
from loftq.refine.windows import Windows, read_windows
from loftq.report.progress import bar
from loftq.report.record import QuantizationReport
from loftq.report.system import PeakMemory, versions

SAVE_SECONDS = 60.0  # between two savings of the state, which takes a second for some hundred MB of adapters
STATES_BYTES = 2_000_000_000  # of hidden states in memory; more goes to a file
Progress = Callable[[str, int], None]


def refine(
    out_dir: str | Path,
    source: str | Path | None = None,
    *,
    text: str | Path | Tensor | Any,
    settings: RefineSettings | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
    command: str | None = None,
    **options: Any,
) -> RefinementReport:
    """Tune the adapters of a quantized folder so that it does what its full-precision source does.

    The backbone's codes stay as they are, and without ``scales=True`` so does every byte of it. The folder is replaced
    only if the result is closer to the source on held-out windows of the text; its former adapter stays beside it as
    ``loftq_init_unrefined``, where the backbone is the same. An interrupted run continues when it is started again.

    Args:
        out_dir: a folder that :func:`loftq.quantize_checkpoint` has written.
        source: the model it was made from; by default the one that its report names.
        text: what :func:`loftq.calibrate.text.calibration_tokens` takes, or token ids (n, length), or an object with
            ``ids`` (n, length) and ``mask`` (n, length).
        settings: what to do; or its fields as ``options``, e.g. ``stages=("model",), learning_rate=5e-4``.
        out: another folder for the result, absent or empty, which shares unchanged weight files with ``out_dir`` as hard
            links. By default the result takes the place of ``out_dir``.
        resume: continue an interrupted run with the same settings; otherwise start over.
        progress: a bar on a terminal, a plain line now and then elsewhere.
        command: recorded in the report.

    Raises:
        SourceError: no quantized folder, another source, or a text that cannot be used. ConfigError: a setting or a model
            that does not fit. OutputError: the result cannot be written, or an unfinished run has other settings.
    """
    settings = dataclasses.replace(settings or RefineSettings(), **options)
    folder = Path(os.path.realpath(os.path.expanduser(out_dir)))
    target = folder if out is None else Path(os.path.realpath(os.path.expanduser(out)))
    if finish_move(target):
        finished = RefinementReport.load(target)
        if finished.settings == dataclasses.replace(settings, dtype=dtype_name(settings.dtype)).to_dict():
            return finished
    read_quantization_config(folder)
    report = QuantizationReport.load(folder)
    if target != folder:
        from loftq.checkpoint.writer import check_target

        check_target(target)
    return _Refinement(folder, target, report, settings, checked_source(source, report.source)).run(
        text, resume, progress, command
    )


class _Refinement:
    def __init__(
        self, folder: Path, target: Path, report: QuantizationReport, settings: RefineSettings, source: Source
    ) -> None:
        self.folder = folder
        self.target = target
        self.report = report
        self.settings = dataclasses.replace(settings, dtype=dtype_name(settings.dtype))
        self.source = source
        self.dtype = getattr(torch, self.settings.dtype)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.layers: dict[str, Adapted] = {}
        self.teacher: nn.Module | None = None

    def run(self, text: Any, resume: bool, progress: bool, command: str | None) -> RefinementReport:
        started = time.perf_counter()
        memory = PeakMemory().start()
        teacher = load_dense(self.source, self.dtype)
        windows = read_windows(text, self.folder, self.settings, teacher)
        self._check_length(teacher, windows)
        self.teacher = teacher.to(self.device)
        del teacher
        student, self.layers = load_student(self.folder, self.report, self.dtype, self.device)
        parameters = trainable(student, self.layers, self.settings.scales)
        state = SavedState(self.target, self._fingerprint(windows), resume)
        try:
            original = snapshot(parameters)
            stages, metric, before, after = self._stages(student, windows, parameters, state, progress)
            changed = after < before
            if not changed:
                put_back(parameters, original)
                after = before
            record = RefinementReport(
                changed=changed,
                metric=metric,
                before=before,
                after=after,
                stages=stages,
                text={
                    "name": windows.name,
                    "sha256": windows.sha256,
                    "windows": len(windows.ids),
                    "held_out": windows.held_out,
                    "length": windows.ids.shape[1],
                },
                settings=self.settings.to_dict(),
                source=self.report.source,
                backbone_sha256=self.report.backbone_sha256,
                adapter_sha256=self.report.adapter_sha256,
                previous={
                    "backbone_sha256": self.report.backbone_sha256,
                    "adapter_sha256": self.report.adapter_sha256,
                },
                versions=versions(),
                command=command,
                seconds=round(time.perf_counter() - started, 3),
                peak_memory_bytes=memory.peak(),
            )
            if changed:
                errors = weight_errors(self.source, self.folder, self.layers)
                adapter, backbone = new_tensors(self.folder, self.layers)
            else:
                errors, adapter, backbone = {}, {}, {}
            if changed or self.target != self.folder:
                record = write_refined(self.folder, self.target, adapter, backbone, errors, record)
            else:
                record.save(self.folder)
            state.remove()
        finally:
            state.close()
        return record

    def _check_length(self, model: Any, windows: Windows) -> None:
        limit = getattr(model.config, "max_position_embeddings", None)
        length = windows.ids.shape[1]
        if limit is not None and 0 < limit < length:
            raise ConfigError(
                f"length is {length}, but the model has {limit} positions; choose a length of at most {limit}"
            )

    def _fingerprint(self, windows: Windows) -> dict[str, Any]:
        return {
            "settings": self.settings.to_dict(),
            "text": windows.sha256,
            "folder": str(self.folder),
            "backbone": self.report.backbone_sha256,
            "adapter": self.report.adapter_sha256,
            "format": versions()["loftq"],
        }

    def _stages(
        self,
        student: nn.Module,
        windows: Windows,
        parameters: dict[str, nn.Parameter],
        state: SavedState,
        progress: bool,
    ) -> tuple[list[StageRecord], str, float, float]:
        """Run what is left of all stages: their records, the metric, and its value before and after."""
        assert self.teacher is not None
        tokens = windows.ids.numel()
        with bar(tokens, "reading", "tokens", show=progress) as advance:
            states = teacher_states(
                self.teacher, windows, self.settings.batch_tokens, state.path / "hidden", STATES_BYTES, advance
            )
        heads = None
        if is_causal(student):
            full = output_head(self.teacher, windows.ids[-1])
            own = output_head(student, windows.ids[-1])
            heads = (own if isinstance(output_layer(student), AdaptedLinear) else full, full)
        distance = Distance(student, states, heads, windows, self.settings)
        records = [StageRecord(**r) for r in state.progress.get("stages", [])]
        before = current = distance.held_out()
        if records:
            before = records[0].before
            current = min(before, *(r.after for r in records if r.kept), before)
            kept = "s." if "model" in state.progress else "p."
            put_back(parameters, {n: state.tensors[f"{kept}{n}"] for n in parameters})
        for name in self.settings.stages[len(records) :]:
            start = snapshot(parameters)
            if name == "blocks":
                assert self.teacher is not None
                record = self._blocks(self.teacher, student, windows, parameters, state, distance, current, progress)
            else:
                self.teacher = None  # its last hidden states and its output layer are all that is needed now
                record = self._model(parameters, state, distance, current, records, progress)
            round_factors(self.layers)
            value = distance.held_out()
            record = dataclasses.replace(record, after=value, kept=value < current)
            if record.kept:
                current = value
            else:
                put_back(parameters, start)
            records.append(record)
            state.save(
                {"stages": [dataclasses.asdict(r) for r in records]},
                {f"p.{n}": p.detach() for n, p in parameters.items()},
            )
            state.progress = {}
        return records, distance.metric, before, current

    def _blocks(
        self,
        teacher: nn.Module,
        student: nn.Module,
        windows: Windows,
        parameters: dict[str, nn.Parameter],
        state: SavedState,
        distance: Distance,
        before: float,
        progress: bool,
    ) -> StageRecord:
        saved = state.progress.get("blocks", {"curve": [], "steps": 0, "tokens": 0})
        curve: list[dict[str, Any]] = list(saved["curve"])
        stage = BlockStage(
            teacher, student, self.layers, parameters, windows, self.settings, state.path, STATES_BYTES // 4
        )
        stage.steps, stage.tokens = saved["steps"], saved["tokens"]
        if curve:
            put_back(parameters, {n: state.tensors[f"p.{n}"] for n in parameters})
        clock = _Clock()

        def done(index: int, record: dict[str, Any]) -> None:
            curve.append(record)
            if clock.due():
                state.save(
                    {"blocks": {"curve": curve, "steps": stage.steps, "tokens": stage.tokens}},
                    {f"p.{n}": p.detach() for n, p in parameters.items()},
                )

        work = (len(stage.names) - len(curve)) * self.settings.block_epochs * len(windows.train) * windows.ids.shape[1]
        with bar(work, "blocks", "tokens", show=progress) as advance:
            stage.run(len(curve), done, advance)
        return StageRecord("blocks", before, before, False, stage.steps, stage.tokens // len(stage.names), curve)

    def _model(
        self,
        parameters: dict[str, nn.Parameter],
        state: SavedState,
        distance: Distance,
        before: float,
        records: list[StageRecord],
        progress: bool,
    ) -> StageRecord:
        stage = ModelStage(distance, parameters, before)
        start = {f"s.{n}": t for n, t in stage.best.items()}
        if "model" in state.progress:
            stage.restore(state.progress["model"], state.tensors)
        state.tensors = {}
        clock = _Clock()

        def after_step() -> None:
            if clock.due():
                state.save(
                    {
                        "stages": [dataclasses.asdict(r) for r in records],
                        "model": stage.progress(),
                    },
                    {**stage.tensors(), **start},
                )

        left = (stage.steps - stage.optimizer.step_number) * max(1, self.settings.batch_tokens)
        with bar(left, "model", "tokens", show=progress) as advance:
            stage.run(after_step, advance)
        return StageRecord("model", before, before, False, stage.optimizer.step_number, stage.tokens, stage.curve)


class _Clock:
    """Whether it is time to save again."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def due(self) -> bool:
        if time.monotonic() - self._last < SAVE_SECONDS:
            return False
        self._last = time.monotonic()
        return True
