"""What a model answered, saved as JSON lines: one object a question, no header, UTF-8.

    {"id": "q1", "input": "2 + 2?", "prediction": "#### 4", "reference": "4", "score": 1.0}

``id`` is the data set's own, a text or an integer; ``input`` what the model was given, as text. ``prediction`` and
``reference`` are what the task compares: texts, labels, numbers, or a list of right answers. ``score`` is left out where
the metric says nothing of a single question, as a correlation does. NaN and infinity, which JSON has not, become null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loftq.checkpoint.writer import disk_errors
from loftq.errors import SourceError

_REQUIRED = {"id", "input", "prediction", "reference"}


@dataclass(frozen=True)
class Prediction:
    """One row of the file; ``score`` is ``None`` where there is none for a single question."""

    id: str | int
    input: str
    prediction: Any
    reference: Any
    score: float | None = None


def write_predictions(path: str | Path, rows: Iterable[Prediction]) -> None:
    """Write the file whole: under another name first, then renamed, in place of an earlier one.

    Raises:
        OutputError: if it cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # half of a surrogate pair has no UTF-8, but \udXXX is how JSON spells it
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
            for row in rows:
                values = _plain(asdict(row))
                if values["score"] is None:
                    del values["score"]
                file.write(json.dumps(values, ensure_ascii=False) + "\n")
        os.replace(partial, path)


def read_predictions(path: str | Path) -> list[Prediction]:
    """The rows of a file of :func:`write_predictions`.

    Raises:
        SourceError: there is no such file, or one of its lines is no row.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read ({error}), expected a file of predictions") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(_row(line, f"line {number} of {path}"))
    return rows


def _row(line: str, place: str) -> Prediction:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise SourceError(f"{place} is no JSON ({error}); write the predictions again") from None
    if not isinstance(values, dict) or not _REQUIRED <= set(values) <= {*_REQUIRED, "score"}:
        raise SourceError(f"{place} is no prediction, expected an object with id, input, prediction and reference")
    return Prediction(**values)


def _plain(value: Any) -> Any:
    """Only what JSON can hold: numpy's and torch's numbers as Python's, and no NaN."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
