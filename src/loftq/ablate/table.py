"""The two tables of an ablation, which are also its memory: what they hold is not measured again."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from loftq.ablate.discrepancy import NORMS, Discrepancy
from loftq.ablate.factors import FACTORS, Factors
from loftq.checkpoint.writer import disk_errors, replace_text
from loftq.errors import SourceError

TABLE = "ablation.csv"
MODULES = "modules.csv"
BEFORE, AFTER, SPREAD = "before_", "after_", "_sd"


@dataclass(frozen=True)
class Row:
    """One cell. ``None`` where a number does not apply.

    Attributes:
        factors: what was quantized, without what makes no difference; the method ``float`` is the full-precision model.
        frobenius, frobenius_relative, spectral, spectral_relative: means over the modules, see
            :class:`loftq.ablate.discrepancy.Discrepancy`.
        perplexity, perplexity_se: before fine-tuning, with its standard error.
        metrics: of the task: ``before_NAME`` and ``after_NAME`` fine-tuning, with several seeds their mean, and ``…_sd``, the
            sample standard deviation. status: of the training, or trainings.
        bits_per_weight: measured, adapters apart. bytes: of the same; adapter_bytes: of A and B, 0 where nothing is fitted.
        seconds: of the quantization; training_seconds: of all trainings.
        seed, command: that gave the row. error: why the cell failed, in one sentence.
    """

    factors: Factors
    bits_per_weight: float | None = None
    frobenius: float | None = None
    frobenius_relative: float | None = None
    spectral: float | None = None
    spectral_relative: float | None = None
    perplexity: float | None = None
    perplexity_se: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    status: str | None = None
    seconds: float | None = None
    training_seconds: float | None = None
    bytes: int | None = None
    adapter_bytes: int | None = None
    seed: int = 0
    command: str | None = None
    error: str | None = None

    def value(self, name: str) -> float | None:
        """A measurement by the name of its column."""
        return self.metrics.get(name) if name.startswith((BEFORE, AFTER)) else getattr(self, name)

    def to_dict(self) -> dict[str, Any]:
        """One flat dict, as JSON can hold it, which has no infinity."""
        values = asdict(self)
        flat = {**values.pop("factors"), **values.pop("metrics"), **values}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in flat.items()}


def over_seeds(prefix: str, found: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Mean of each metric, and with several seeds its sample standard deviation; without what is undefined for one."""
    result = {}
    for name in found[0]:
        values = [metrics.get(name) for metrics in found]
        known = [v for v in values if v is not None]
        if len(known) == len(values):
            result[f"{prefix}{name}"] = statistics.fmean(known)
            if len(known) > 1:
                result[f"{prefix}{name}{SPREAD}"] = statistics.stdev(known)
    return result


_INTEGERS = ("bytes", "adapter_bytes", "seed")
_TEXTS = ("status", "command", "error")
_MEASURED = tuple(f.name for f in fields(Row) if f.name not in ("factors", "metrics"))
_FRONT = _MEASURED[: _MEASURED.index("status")]
_FACTOR_TYPES: dict[str, Callable[[str], Any]] = {"bits": float, "rank": int, "iters": int, "damping": float}


class Tables:
    """The finished cells of a folder, written after each.

    Args:
        folder: exists; with the tables of an earlier run or without.

    Raises:
        SourceError: the tables are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[Factors, Row] = {}
        self.modules: dict[Factors, list[Discrepancy]] = {}
        for values in _read(folder / TABLE, _row_of):
            self.rows[values.factors] = values
        for factors, module in _read(folder / MODULES, _module_of):
            if factors in self.rows:  # otherwise it was interrupted between the two files
                self.modules.setdefault(factors, []).append(module)

    def add(self, row: Row, modules: list[Discrepancy]) -> None:
        """Save a cell, in place of an earlier one of the same factors. The row is written last and makes it finished."""
        self.rows[row.factors] = row
        self.modules[row.factors] = modules
        metrics = list(dict.fromkeys(name for r in self.rows.values() for name in r.metrics))
        lines = [
            {**_cells(r.factors), **r.metrics, **{n: getattr(r, n) for n in _MEASURED}} for r in self.rows.values()
        ]
        details = [{**_cells(f), **m.to_dict()} for f, found in self.modules.items() for m in found]
        with disk_errors(self.folder):
            _write(self.folder / MODULES, (*FACTORS, "name", "kind", "layer", *NORMS), details)
            _write(self.folder / TABLE, (*FACTORS, *_FRONT, *metrics, *_MEASURED[len(_FRONT) :]), lines)


def _cells(factors: Factors) -> dict[str, Any]:
    return {
        **asdict(factors),
        "bits": f"{factors.bits:g}",
        "calibration": "none" if factors.calibration is None else factors.calibration,
    }


def _write(path: Path, columns: Iterable[str], lines: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    replace_text(path, text.getvalue())


def _read(path: Path, parse: Callable[[dict[str, str]], Any]) -> list[Any]:
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            return [parse(line) for line in csv.DictReader(stream)]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise SourceError(
            f"{path} cannot be read ({error}); expected a table of `loftq ablate`, unchanged: remove the folder to start over"
        ) from None


def _factors_of(line: Mapping[str, str]) -> Factors:
    values: dict[str, Any] = {n: _FACTOR_TYPES.get(n, str)(line[n]) if line[n] else None for n in FACTORS}
    if values["calibration"] == "none":
        values["calibration"] = None
    if values["bits"].is_integer():
        values["bits"] = int(values["bits"])
    return Factors(**values)


def _row_of(line: dict[str, str]) -> Row:
    values: dict[str, Any] = {}
    for name in _MEASURED:
        kind = int if name in _INTEGERS else str if name in _TEXTS else float
        values[name] = kind(line[name]) if line[name] else None
    metrics = {name: float(text) for name, text in line.items() if name.startswith((BEFORE, AFTER)) and text}
    return Row(_factors_of(line), metrics=metrics, **values)


def _module_of(line: dict[str, str]) -> tuple[Factors, Discrepancy]:
    norms = {name: float(line[name]) for name in NORMS}
    layer = int(line["layer"]) if line["layer"] else None
    return _factors_of(line), Discrepancy(line["name"], line["kind"], layer, **norms)
