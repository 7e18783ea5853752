"""What a starting point is worth, on a real model, in minutes: the table of ``loftq quickstart``.

Each row is one run of ``loftq quantize`` in a process of its own, so that its time and peak memory are its own, and an
evaluation of the folder it wrote. The text is the standard library's documentation: every Python has it.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loftq.calibrate.choose import collect_statistics
from loftq.checkpoint.writer import disk_errors
from loftq.command import run_loftq
from loftq.compare import merged
from loftq.config import LoftQConfig
from loftq.errors import OutputError, SourceError
from loftq.evaluate.models import default_window, encode, load_for_inference, load_tokenizer
from loftq.evaluate.perplexity import perplexity
from loftq.evaluate.text import BUILTIN, builtin_text
from loftq.refine import refine
from loftq.report.progress import bar
from loftq.report.record import QuantizationReport
from loftq.report.system import machine, versions
from loftq.report.tables import number, size

RESULTS = "quickstart.json"
STATISTICS = "statistics.safetensors"
KEPT = "loftq-2bit"  # the folder that stays, for the commands printed at the end

# Share of the built-in text before the evaluated slice begins; calibration and refinement use less than 0.55 of it.
_SLICE_BEGINS = 0.6


# What calibration and refinement read of the built-in text; both stay below 0.55 of it. Gradients and more iterations
# are worth having but take more minutes than this table should.
_CALIBRATION_WINDOWS = 12
_REFINEMENT: dict[str, Any] = {
    "samples": 12,
    "batch_tokens": 128,
    "epochs": 1,
    "stages": ("model",),
    "learning_rate": 1e-4,
}
_REFINED_LENGTH = 128


@dataclass(frozen=True)
class Variant:
    """One row: a label, the folder's name and the options of ``loftq quantize``; ``data`` adds the statistics."""

    label: str
    folder: str
    options: tuple[str, ...]
    data: bool = False


VARIANTS = (
    Variant("QLoRA, 2 bits", "qlora-2bit", ("--bits", "2", "--method", "qlora", "--published")),
    Variant(
        "LoftQ as published, 2 bits",
        "published-2bit",
        ("--bits", "2", "--method", "loftq", "--published", "--iters", "5"),
    ),
    Variant("loftq-data, 2 bits", KEPT, ("--bits", "2", "--iters", "1"), data=True),
    Variant("loftq-data-zero, 3 bits", "loftq-3bit", ("--bits", "3", "--iters", "1"), data=True),
    Variant("loftq-data-zero, 4 bits", "loftq-4bit", ("--bits", "4", "--iters", "1"), data=True),
)


@dataclass(frozen=True)
class Row:
    """One line of the table; ``None`` where a column does not apply."""

    label: str
    bits_per_weight: float
    backbone_bytes: int
    adapter_bytes: int
    weight_error: float | None
    perplexity: float
    perplexity_se: float
    seconds: float | None
    peak_memory_bytes: int | None
    command: str | None


COLUMNS = ("", "bits/weight", "checkpoint", "adapter", "weight error", "perplexity", "seconds", "peak memory")


def cells(row: Row) -> list[str]:
    """A row as the table shows it, one string a column."""
    return [
        row.label,
        f"{row.bits_per_weight:.2f}",
        size(row.backbone_bytes),
        size(row.adapter_bytes) if row.adapter_bytes else "",
        "" if row.weight_error is None else f"{row.weight_error:.3f}",
        f"{number(row.perplexity)} ± {number(row.perplexity_se)}",
        "" if row.seconds is None else f"{row.seconds:.1f}",
        "" if row.peak_memory_bytes is None else size(row.peak_memory_bytes),
    ]


def run(
    model: str | None, work_dir: Path, *, rank: int = 64, max_tokens: int = 2048, keep_all: bool = False
) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Yield each row as it is measured, with the results so far as they stand in ``quickstart.json``.

    Args:
        model: folder or hub id of a causal language model; ``None`` for the embedded default.
        work_dir: where folders and results go; created.
        rank: of the adapters.
        max_tokens: tokens to evaluate on.
        keep_all: keep every quantized folder, not only the 2-bit one.

    Raises:
        SourceError, OutputError: one sentence each.
    """
    with disk_errors(work_dir):
        work_dir.mkdir(parents=True, exist_ok=True)
        if any(work_dir.iterdir()) and not (work_dir / RESULTS).exists():
            raise OutputError(f"{work_dir} holds something else than an earlier quickstart; choose another with --out")
    source = model or str(_default_model())
    tokenizer = load_tokenizer(source)
    text = builtin_text()
    ids = encode(tokenizer, text[int(len(text) * _SLICE_BEGINS) :], max_tokens)
    results: dict[str, Any] = {
        "model": model or "SmolLM2-135M-Instruct (embedded default)",
        "rank": rank,
        "text": {"name": BUILTIN, "begins_at": _SLICE_BEGINS, "tokens": ids.numel()},
        "machine": machine(),
        "versions": versions(),
        "rows": [],
    }

    def finish(row: Row) -> tuple[Row, dict[str, Any]]:
        results["rows"].append(asdict(row))
        (work_dir / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        return row, results

    def measure(folder: str, label: str) -> tuple[float, float]:
        loaded = merged(load_for_inference(folder))
        window = default_window(loaded, None)
        results["text"]["window"] = window
        with bar(ids.numel() - 1, f"evaluating {label}", "tokens") as advance:
            result = perplexity(loaded, ids, window=window, advance=advance)
        return result.perplexity, result.standard_error

    (work_dir / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    value, deviation = measure(source, "full precision")
    total, bits = _checkpoint_size(source)
    yield finish(Row("full precision", bits, total, 0, None, value, deviation, None, None, None))

    statistics = work_dir / STATISTICS
    window: int = results["text"]["window"]
    calibration = LoftQConfig(
        calibration=BUILTIN,
        calibration_samples=_CALIBRATION_WINDOWS,
        calibration_length=min(512, window),
        calibration_gradients=0,
    )
    collect_statistics(source, calibration).save(statistics)
    for variant in VARIANTS:
        out = work_dir / variant.folder
        shutil.rmtree(out, ignore_errors=True)
        options = ["quantize", source, "--out", str(out), "--rank", str(rank), *variant.options]
        options += ["--statistics", str(statistics)] if variant.data else []
        report = run_loftq([*options, "--json", "--no-resume"])
        value, deviation = measure(str(out), variant.label)
        totals, timing = report["totals"], report["timing"]
        row = Row(
            variant.label,
            totals["bits_per_weight"],
            totals["weight_bytes"] + totals["other_bytes"],
            totals["adapter_bytes"],
            totals["mean_error"],
            value,
            deviation,
            timing["seconds"],
            timing["peak_memory_bytes"],
            shlex.join(["loftq", *options]),
        )
        yield finish(row)
        if variant.data:
            refined = refine(out, text=BUILTIN, length=min(_REFINED_LENGTH, window), **_REFINEMENT)
            label = f"{variant.label}, refined"
            value, deviation = measure(str(out), label)
            weight_error = QuantizationReport.load(out).mean_error
            yield finish(
                replace(
                    row,
                    label=label,
                    weight_error=weight_error,
                    perplexity=value,
                    perplexity_se=deviation,
                    seconds=refined.seconds,
                    peak_memory_bytes=refined.peak_memory_bytes,
                    command=None,
                )
            )
        if variant.folder != KEPT and not keep_all:
            shutil.rmtree(out)
    if not keep_all:
        statistics.unlink()


def _default_model() -> Path:
    from loftq.checkpoint.default_model import default_model_dir

    return default_model_dir()


def _checkpoint_size(model: str) -> tuple[int, float]:
    """Bytes of a checkpoint's tensors, and the bits of its widest floating dtype."""
    from loftq.checkpoint.source import open_source

    infos = open_source(model).tensors.values()
    floating = [i.dtype.itemsize for i in infos if i.dtype.is_floating_point]
    if not floating:
        raise SourceError(f"{model} has no floating-point tensors, expected a full-precision model")
    return sum(i.nbytes for i in infos), 8.0 * max(floating)


def next_commands() -> list[str]:
    """What a user runs next on a model of their own."""
    return [
        "loftq quantize MODEL --bits 2 --rank 64 --out my-model-2bit",
        "loftq evaluate my-model-2bit --text my-text.txt",
        'loftq generate my-model-2bit --prompt "Once upon a time"',
    ]
