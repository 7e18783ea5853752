"""What one process does in a training run, from its settings to the state that is kept."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loftq.checkpoint.writer import replace_text
from loftq.data.check import summary
from loftq.data.collate import Collator, padding_id, writing_ids
from loftq.data.examples import Examples
from loftq.data.prepare import positions, prepare, tokenizer_for
from loftq.data.tasks import task
from loftq.errors import SourceError
from loftq.evaluate.models import check_causal, load_config
from loftq.evaluate.predictions import write_predictions
from loftq.evaluate.rouge import ROUGE, conditions
from loftq.evaluate.task import SMALLER_IS_BETTER, Measurement, check_classes, check_metrics, measure
from loftq.finetune import processes
from loftq.finetune.adapter import trainable_counts
from loftq.finetune.checkpoints import resume_point, step_of
from loftq.finetune.folder import BEFORE, CHECKPOINTS, PREDICTIONS, known_before, writing
from loftq.finetune.model import Start, build
from loftq.finetune.packing import check_isolated
from loftq.finetune.places import Places
from loftq.finetune.record import RECORD, TrainingRecord
from loftq.finetune.reporters import check_reporter, reporter
from loftq.finetune.save import save_result
from loftq.finetune.settings import TrainSettings
from loftq.finetune.trainer import TaskTrainer, as_loaded, enough_memory, total_steps, training_arguments
from loftq.finetune.watch import Divergence, Patience, Progress
from loftq.hub.adapter import INIT_DIR
from loftq.hub.backbone import adapter_config, recorded_backbone
from loftq.report.progress import bar, say
from loftq.report.system import TRAINING_PACKAGES, PeakMemory, machine, versions
from loftq.report.training import metrics_line


class Training:
    """One run in this process: data, model, Trainer, and what is kept in the end."""

    def __init__(
        self,
        run: Path,
        settings: TrainSettings,
        start: Start,
        places: Places,
        command: str | None,
        notice: Callable[[str], None],
    ) -> None:
        self.folder = run
        self.places = places
        self.settings = settings
        self.start = start
        self.command = command
        self.notice = notice
        self.metrics = check_metrics(settings.data.task, settings.metric_names)
        check_reporter(settings.report_to)
        self.tokenizer = tokenizer_for(start.base, settings.data, settings.eval_data, revision=start.revision)

    def run(self, progress: bool, begin: Callable[[], None]) -> TrainingRecord:
        """``begin`` is called once the data and the model are there, before anything is written."""
        started = time.perf_counter()
        memory = PeakMemory().start()
        config = load_config(self.start.base, self.start.revision)
        settings = self.settings
        examples, labels = prepare(settings.data, self.tokenizer, config)
        held: Examples | None = None
        if settings.eval_data is not None:
            held, _ = prepare(settings.eval_data.to_measure(), self.tokenizer, config, labels=labels)
            check_classes(self.metrics, labels)
        notes = [*examples.notes(), *(held.notes() if held else [])]
        if settings.eval_data is not None:
            said = settings.eval_data.notice_of_training_on(settings.data)
            notes += [f"{notice}; name other data with --eval-data" for notice in said]
        for note in notes:
            self.notice(note)
        model, heads = build(self.start, settings, labels)
        if settings.data.task == "summarization":
            writing_ids(model, self.tokenizer)
        begin()
        trainable, parameters = trainable_counts(model)
        backbone = recorded_backbone(adapter_config(self.start.folder / INIT_DIR)) if self.start.folder else None
        record = TrainingRecord(
            settings=settings.to_dict(),
            base=self.start.base,
            revision=self.start.revision,
            init_from=str(self.start.folder) if self.start.folder else None,
            backbone_sha256=backbone if self.start.quantized else None,
            places=self.places,
            labels=labels,
            heads=heads,
            trainable=trainable,
            parameters=parameters,
            data=summary(examples, labels),
            eval_data=summary(held, labels) if held else None,
            notes=notes,
            command=self.command,
            versions=versions(*TRAINING_PACKAGES),
            machine={**machine(), **({"processes": processes.count()} if processes.count() > 1 else {})},
        )
        if record.eval_data is not None and set(self.metrics) & set(ROUGE):
            record.eval_data["rouge"] = conditions(settings.rouge_stem)
        self._train(model, examples, held, labels, record, progress)
        record.timing = {
            "seconds": round(time.perf_counter() - started, 3),
            "training_seconds": record.timing.get("training_seconds"),
            "peak_memory_bytes": memory.peak(),
            **memory.gpu(),
        }
        if processes.is_main():
            with writing(self.folder):
                record.save(self.folder)
            shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)
        return record

    def _train(
        self,
        model: nn.Module,
        examples: Examples,
        held: Examples | None,
        labels: list[str] | None,
        record: TrainingRecord,
        progress: bool,
    ) -> None:
        settings = self.settings
        best = self.metrics[0] if held else None
        arguments = training_arguments(settings, self.folder, best, best not in SMALLER_IS_BETTER)
        divergence = Divergence(is_measured=best is not None)
        callbacks: list[Any] = [divergence]
        if settings.patience is not None:
            callbacks.append(Patience(settings.patience))
        if settings.report_to != "none" and processes.is_main():
            callbacks.append(reporter(settings.report_to, self.folder, self.notice))

        latest: dict[int, Measurement] = {}

        def measured(trained: nn.Module) -> dict[str, float]:
            latest.clear()
            step = trainer.state.global_step
            latest[step] = found = self._measure(trained, held, labels, progress)
            if progress:
                say(f"step {step} of {steps}: {metrics_line(found.known)}")
            return processes.agreed(found.known)

        start_decoder = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        trainer = TaskTrainer(
            model,
            arguments,
            examples,
            Collator(
                settings.data.task,
                padding_id(model, self.tokenizer),
                multiple_of=8 if torch.cuda.is_available() else 1,
                limit=positions(model.config),
                decoder_start=start_decoder if settings.data.task == "summarization" else None,
            ),
            measured if held else None,
            callbacks,
        )
        if task(settings.data.task).is_causal:  # after the Trainer has put the model where it is trained
            check_causal(model, self.start.base)
        if settings.data.packing and settings.data.task != "causal":
            check_isolated(model)
        checkpoint = self._resume_point()
        done, steps = step_of(checkpoint), total_steps(trainer, settings)
        if progress and checkpoint is not None:
            say(f"continuing from step {done} of {steps}")
        begun = self.folder / BEFORE
        if held is not None:
            record.before = processes.agreed(known_before(begun) if checkpoint else None)
            if record.before is None:
                record.before = self._measure(model.to(arguments.device), held, labels, progress).known
                if progress:
                    say(f"before training: {metrics_line(record.before)}")
                if processes.is_main():
                    with writing(self.folder):
                        replace_text(begun, json.dumps(record.before))
        clock = time.perf_counter()
        with bar(steps, f"training ({settings.method})", "steps", done=done, show=progress) as advance:
            trainer.add_callback(Progress(advance))
            with enough_memory():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        record.timing["training_seconds"] = round(time.perf_counter() - clock, 3)
        self._finish(trainer, divergence, held, labels, record, progress, latest)
        if processes.is_main():
            begun.unlink(missing_ok=True)

    def _finish(
        self,
        trainer: TaskTrainer,
        divergence: Divergence,
        held: Examples | None,
        labels: list[str] | None,
        record: TrainingRecord,
        progress: bool,
        latest: dict[int, Measurement],
    ) -> None:
        """``latest``: the last measurement by its step; that of the result, unless an earlier state is kept."""
        history = trainer.state.log_history
        names = ("step", "epoch", "loss", "learning_rate", "grad_norm")
        record.curve = [{n: entry.get(n) for n in names} for entry in history if "loss" in entry]
        record.evaluations = [
            {"step": e["step"], "epoch": e["epoch"], **{k[5:]: v for k, v in e.items() if k.startswith("eval_")}}
            for e in history
            if any(k.startswith("eval_") for k in e)
        ]
        kept = trainer.state.best_model_checkpoint if held else None
        record.best_step = step_of(Path(kept)) if kept else trainer.state.global_step
        if divergence.reason is not None:
            record.status = f"diverged: {divergence.reason}"
            if kept is None:
                last = self._resume_point(until=divergence.good_until)
                record.best_step = step_of(last)
                if last is None:
                    if processes.is_main():
                        with writing(self.folder):
                            record.save(self.folder)
                    raise SourceError(
                        f"the run diverged before its first good checkpoint ({divergence.reason}); lower the learning rate "
                        f"({self.settings.learning_rate:g}), and see {self.folder / RECORD} for the curve"
                    )
                trainer._load_from_checkpoint(str(last), trainer.model)
            self.notice(
                f"the run diverged ({divergence.reason}); the result is its checkpoint of step {record.best_step}"
            )
        else:
            early = trainer.state.global_step < trainer.state.max_steps
            record.status = "stopped early" if early else "finished"
        if held is not None:
            result = latest.get(record.best_step) or self._measure(trainer.model, held, labels, progress)
            record.after = result.known
            if result.predictions and processes.is_main():
                with writing(self.folder):
                    write_predictions(self.folder / PREDICTIONS, result.predictions)
                record.predictions = PREDICTIONS
        weights = trainer.whole_weights()
        if processes.is_main():
            with writing(self.folder):
                save_result(trainer.model, self.tokenizer, self.folder, self.start, record, weights)

    def _resume_point(self, until: int | None = None) -> Path | None:
        """See :func:`resume_point`; the main process looks."""
        main = processes.is_main()
        found = resume_point(self.folder / CHECKPOINTS, self.notice, until=until) if main else None
        return processes.agreed(found)

    def _measure(
        self, model: nn.Module, held: Examples | None, labels: list[str] | None, progress: bool
    ) -> Measurement:
        assert held is not None
        settings = self.settings
        with (
            as_loaded(model),
            processes.gathered(model),
            bar(len(held), "measuring", "examples", show=progress) as advance,
        ):
            return measure(
                model,
                self.tokenizer,
                held,
                self.metrics,
                batch_size=settings.eval_batch_size or settings.batch_size,
                labels=labels,
                max_new_tokens=settings.max_new_tokens,
                num_beams=settings.num_beams,
                rouge_stem=settings.rouge_stem,
                advance=advance,
            )
