"""Every cell of an ablation: quantized, measured, fine-tuned where asked for, saved, and removed."""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from loftq.ablate.discrepancy import NORMS, Discrepancy, DiscrepancyMeter, means
from loftq.ablate.factors import Factors
from loftq.ablate.inputs import check_inputs
from loftq.ablate.settings import Ablation
from loftq.ablate.table import AFTER, BEFORE, Row, Tables, over_seeds
from loftq.calibrate.kept import kept_statistics
from loftq.calibrate.statistics import Statistics
from loftq.checkpoint.assembly import Parameters
from loftq.checkpoint.naming import meta_model
from loftq.checkpoint.source import Source, open_source
from loftq.checkpoint.writer import disk_errors, lock_file
from loftq.compare import FLOAT, merged
from loftq.config import LoftQConfig
from loftq.errors import LoftQError, first_line
from loftq.evaluate.models import default_window, load_for_inference
from loftq.evaluate.perplexity import perplexity
from loftq.evaluate.tokens import text_digest
from loftq.finetune.run import train
from loftq.pipeline import quantize_checkpoint
from loftq.plan.targets import plan_modules
from loftq.report.cells import claim_folder
from loftq.report.progress import bar

WORK = "cells"

Notice = Callable[[str], None]


def ablate(
    settings: Ablation,
    out: str | Path,
    *,
    command: str | None = None,
    progress: bool = True,
    notice: Notice = lambda sentence: None,
) -> Iterator[tuple[Row, bool]]:
    """Yield each cell and whether it was measured just now; with a text the full-precision model first.

    Args:
        settings: the sweep, and what is measured.
        out: folder of ``ablation.csv`` and ``modules.csv``; created. A finished cell in it is not computed again, one that
            failed is. An interrupted training continues.
        command: recorded in every row. progress: bars on a terminal, plain lines elsewhere.
        notice: takes sentences that a user should read.

    Raises:
        ConfigError, SourceError: before anything is computed.
        OutputError: if ``out`` holds the results of other settings, or something else, or another process writes it.
    """
    folder = Path(os.path.expanduser(out))
    source = open_source(settings.model)
    session = _Session(settings, source, folder, command, progress, notice)
    cells = list(dict.fromkeys(settings.cells().values()))
    configs = [settings.config(cell, session.model) for cell in cells]
    claim_folder(folder, settings.fingerprint(source), "sweep", growing="calibration_sha256")
    with disk_errors(folder):
        lock = (folder / ".lock").open("ab")
    with lock:
        lock_file(lock, folder)
        tables = Tables(folder)
        if settings.text is not None:
            baseline = next((row for row in tables.rows.values() if row.factors.method == FLOAT), None)
            if baseline is None:
                tables.add(row := session.full_precision(), [])
                yield row, True
            else:
                yield baseline, False
        for cell, config in zip(cells, configs, strict=True):
            known = tables.rows.get(cell)
            fresh = known is None or known.error is not None
            if fresh:
                tables.add(*session.measure(cell, config))
            yield tables.rows[cell], fresh
        if not settings.keep:
            shutil.rmtree(folder / WORK, ignore_errors=True)


class _Session:
    """What is computed once and shared by the cells, when the first of them needs it."""

    def __init__(
        self,
        settings: Ablation,
        source: Source,
        folder: Path,
        command: str | None,
        progress: bool,
        notice: Notice,
    ) -> None:
        self.settings, self.source, self.folder = settings, source, folder
        self.command, self.progress = command, progress
        self.model = meta_model(source.config())
        self._said: set[str] = set()
        self._notice = notice
        self._meter: DiscrepancyMeter | None = None
        self._ids = check_inputs(settings, source, self.model)
        self._held: tuple[str, Statistics] | None = None

    def notice(self, sentence: str) -> None:
        """The same is said once, not for every cell."""
        if sentence not in self._said:
            self._said.add(sentence)
            self._notice(sentence)

    def statistics(self, calibration: str) -> Statistics:
        """Collected once for each text, and kept in the folder."""
        if self._held is None or self._held[0] != calibration:
            self._held = None  # the memory, before the next
            config = self.settings.calibrated_on(calibration)
            path = self.folder / f"statistics-{_short(calibration, text_digest(calibration))}.safetensors"
            methods = [c.method for c in self.settings.cells().values() if c.calibration == calibration]
            self._held = calibration, kept_statistics(path, self.source, config, [m for m in methods if m])
        return self._held[1]

    def full_precision(self) -> Row:
        parameters = Parameters(self.source, self.model)
        plans = plan_modules(self.model, self.settings.common())
        stored = sum(parameters.nbytes(plan.parameter) for plan in plans.values())
        width = 8 * stored / sum(plan.numel for plan in plans.values())
        found: dict[str, Any] = dict.fromkeys(NORMS, 0.0)
        return Row(
            Factors(FLOAT, round(width), 0, 0, "none"),
            bits_per_weight=width,
            **found,
            **self._perplexity(load_for_inference(self.settings.model), "full precision"),
            bytes=stored,
            adapter_bytes=0,
            seed=self.settings.seed,
            command=self.command,
        )

    def measure(self, cell: Factors, config: LoftQConfig) -> tuple[Row, list[Discrepancy]]:
        """A cell's row and modules. After an interrupt its folders stay; the next run continues a training in them."""
        folder = self.folder / WORK / slug(cell)
        runs = folder.with_name(f"{folder.name}-runs")
        named: dict[str, Any] = {"factors": cell, "seed": self.settings.seed, "command": self.command}
        modules: list[Discrepancy] = []
        try:
            row, modules = self._measured(config, folder, runs, named)
        except LoftQError as error:
            row = Row(**named, error=str(error))
        except Exception as error:  # the other cells are worth having
            row = Row(**named, error=f"{type(error).__name__}: {first_line(error)}")
        if not self.settings.keep:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(runs, ignore_errors=True)
        gc.collect()  # models have cycles, and the next one needs the memory
        return row, modules

    def _measured(
        self, config: LoftQConfig, folder: Path, runs: Path, named: dict[str, Any]
    ) -> tuple[Row, list[Discrepancy]]:
        cell: Factors = named["factors"]
        shared = None if cell.calibration is None else self.statistics(cell.calibration)
        report = quantize_checkpoint(
            self.source, folder, config, statistics=shared, progress=self.progress, command=self.command
        )
        if self._meter is None:
            self._meter = DiscrepancyMeter(self.source)
        modules = self._meter.measure(folder)
        found: dict[str, Any] = dict(means(modules))
        if self.settings.text is not None:
            found |= self._perplexity(merged(load_for_inference(folder)), label(cell))
        if self.settings.train is not None:
            records = [
                train(
                    runs / str(settings.seed),
                    settings,
                    init_from=folder,
                    progress=self.progress,
                    command=self.command,
                    notice=self.notice,
                )
                for settings in self.settings.trainings(cell)
            ]
            found["metrics"] = over_seeds(BEFORE, [record.before or {} for record in records])
            found["metrics"] |= over_seeds(AFTER, [record.after or {} for record in records])
            found["status"] = ", ".join(dict.fromkeys(record.status for record in records))
            found["training_seconds"] = sum(record.timing["training_seconds"] for record in records)
        row = Row(
            **named,
            **found,
            bits_per_weight=report.bits_per_weight,
            seconds=report.timing["seconds"],
            bytes=report.weight_bytes,
            adapter_bytes=report.adapter_bytes if cell.rank else 0,
        )
        return row, modules

    def _perplexity(self, model: nn.Module, what: str) -> dict[str, Any]:
        assert self._ids is not None
        window = default_window(model, self.settings.window)
        with bar(max(self._ids.numel() - 1, 1), f"evaluating {what}", "tokens", show=self.progress) as advance:
            found = perplexity(model, self._ids, window=window, advance=advance)
        return {"perplexity": found.perplexity, "perplexity_se": found.standard_error}


def label(cell: Factors) -> str:
    """A cell in words: ``loftq, 2 bits, rank 8, T = 5, lloyd``."""
    if cell.method == FLOAT:
        return "full precision"
    parts = [f"{cell.method}", f"{cell.bits:g} bits"]
    parts += [f"rank {cell.rank}"] if cell.rank else []
    parts += [f"T = {cell.iters}", cell.codebook]
    parts += [] if cell.damping is None else [f"λ = {cell.damping:g}"]
    return ", ".join([*parts, *([] if cell.calibration is None else [f"on {Path(cell.calibration).name}"])])


def slug(cell: Factors) -> str:
    """The name of a cell's folder."""
    parts = [cell.method, f"b{cell.bits:g}", f"r{cell.rank}", f"t{cell.iters}", cell.codebook]
    parts += [] if cell.damping is None else [f"d{cell.damping:g}"]
    return "-".join(map(str, parts)) + ("" if cell.calibration is None else f"-{_short(cell.calibration)}")


def _short(*values: str | None) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:8]
