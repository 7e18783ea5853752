"""A training run on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loftq.finetune.record import TrainingRecord
from loftq.report.tables import console, number, size, table


def print_training(record: TrainingRecord) -> None:
    """Metrics before and after, and what it took."""
    out = console()
    if record.after is not None:
        before = record.before or {}
        rows = [
            [name, *(_with_error(values, name) for values in (before, record.after))]
            for name in record.after
            if not name.endswith("_se")
        ]
        out.print(table({"metric": "left", "before": "right", "after": "right"}, rows))
    share = 100 * record.trainable / max(1, record.parameters)
    out.print(
        f"{record.status}: step {record.best_step} of {len(record.curve)} steps kept, {record.trainable:,} of "
        f"{record.parameters:,} weights trained ({share:.2f} %)"
    )
    if record.timing:
        gpu = record.timing.get("peak_gpu_memory_bytes")
        on_gpu = "" if gpu is None else f", on the GPU {size(gpu)}"
        out.print(f"{record.timing['seconds']:.1f} s, peak memory {size(record.timing['peak_memory_bytes'])}{on_gpu}")


def _with_error(values: Mapping[str, float], name: str) -> str:
    if name not in values:
        return ""
    error = values.get(f"{name}_se")
    return number(values[name]) + (f" ± {error:.2g}" if error else "")


def metrics_line(values: Mapping[str, float]) -> str:
    """``perplexity 3.214 ± 0.12, accuracy 88.5``."""
    return ", ".join(f"{name} {_with_error(values, name)}" for name in values if not name.endswith("_se"))


def print_metrics(metrics: dict[str, float | None]) -> None:
    """Metrics with their standard errors."""
    known = {name: value for name, value in metrics.items() if value is not None}
    rows = [
        [name, _with_error(known, name) if value is not None else "undefined"]
        for name, value in metrics.items()
        if not name.endswith("_se")
    ]
    console().print(table({"metric": "left", "value": "right"}, rows))


def print_harness(result: dict[str, Any]) -> None:
    """What :func:`loftq.evaluate.lm_eval.run_tasks` returns."""
    rows = []
    for name, found in result["tasks"].items():
        for metric, value in found["metrics"].items():
            rows.append(
                [name, metric, _with_error({metric: value["value"], f"{metric}_se": value.get("stderr")}, metric)]
            )
    console().print(table({"task": "left", "metric": "left", "value": "right"}, rows))
