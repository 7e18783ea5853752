"""The rows of a comparison, saved one by one, so that an interrupted comparison continues where it was."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq.checkpoint.source import read_json
from loftq.checkpoint.writer import disk_errors, replace_text
from loftq.errors import OutputError, SourceError

if TYPE_CHECKING:
    from loftq.evaluate.output_error import ModuleError

RESULTS = "compare.json"
SETTINGS = "settings.json"
LAYERS = "layers"


@dataclass(frozen=True)
class Cell:
    """One row: a method at some bits per weight. ``None`` where a number does not apply or is not finite.

    Attributes:
        method, bits, rank, seed, command: what was asked for; ``float`` is the full-precision model.
        bpw: measured bits per weight of the quantized matrices, adapters apart. bytes: of the same; adapter_bytes: of A, B.
        weight_error, output_error: means over the modules, see :mod:`loftq.evaluate.output_error`.
        perplexity, perplexity_se, kl, kl_se: see :mod:`loftq.evaluate.divergence`; KL in nats per token.
        seconds: of the quantization.
        error: why the cell failed, in one sentence.
    """

    method: str
    bits: float
    bpw: float | None = None
    rank: int = 0
    weight_error: float | None = None
    output_error: float | None = None
    perplexity: float | None = None
    perplexity_se: float | None = None
    kl: float | None = None
    kl_se: float | None = None
    seconds: float | None = None
    bytes: int | None = None
    adapter_bytes: int | None = None
    seed: int = 0
    command: str | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def finite(self) -> Cell:
        """The cell as JSON can hold it, which has no infinity."""
        values = asdict(self)
        broken = [k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)]
        if not broken:
            return self
        values.update(dict.fromkeys(broken))
        return Cell(
            **{**values, "error": self.error or f"{', '.join(broken)} overflowed; the quantized model is broken"}
        )


class Results:
    """The finished cells of a folder, by (method, bits); written after each.

    Args:
        folder: created; absent, empty, or an earlier comparison's.
        settings: what all cells of the folder have in common, as JSON can hold it.

    Raises:
        OutputError: the folder holds something else, or a comparison with other settings.
        SourceError: its results are damaged.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.done: dict[tuple[str, float], Cell] = {}
        claim_folder(folder, settings, "comparison")
        for row in read_rows(folder / RESULTS) if (folder / RESULTS).exists() else []:
            cell = Cell(**row)
            self.done[cell.method, cell.bits] = cell

    def add(self, cell: Cell) -> Cell:
        """Save a cell, in place of an earlier one of the same method and bits."""
        cell = cell.finite()
        self.done[cell.method, cell.bits] = cell
        with disk_errors(self.folder):
            _write(self.folder / RESULTS, [c.to_dict() for c in self.done.values()])
        return cell


def claim_folder(folder: Path, settings: Mapping[str, Any], kind: str, *, growing: str | None = None) -> None:
    """Create a folder for results, or make sure that those in it have the same settings, which ``settings.json`` says.

    Args:
        settings: what all results of the folder have in common, as JSON can hold it. kind: of results, for messages.
        growing: a setting that maps names to values, to which later commands may add names.

    Raises:
        OutputError: the folder holds something else, or results with other settings. SourceError: the file is damaged.
    """
    now: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    path = folder / SETTINGS
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if any(folder.iterdir()):
                raise OutputError(f"{folder} holds something else than a {kind}; choose another folder with --out")
            _write(path, now)
    known = read_json(path)
    if growing is not None and isinstance(known.get(growing), dict):
        now[growing] = {**known[growing], **now[growing]}
        known[growing] = {**now[growing], **known[growing]}
    different = [k for k in {**known, **now} if known.get(k) != now.get(k)]
    if different:
        name = different[0]
        raise OutputError(
            f"{folder} holds a {kind} with another {name} ({known.get(name)!r}, now {now.get(name)!r}); choose "
            f"another folder with --out"
        )
    if growing is not None:
        with disk_errors(folder):
            _write(path, now)


def save_layers(folder: Path, method: str, bits: float, errors: Iterable[ModuleError]) -> None:
    """Write the errors of every module to ``layers/METHOD-BITS.json``."""
    with disk_errors(folder):
        (folder / LAYERS).mkdir(exist_ok=True)
        _write(folder / LAYERS / f"{method}-{bits:g}.json", [m.to_dict() for m in errors])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``compare.json``.

    Raises:
        SourceError: if it is no list of such rows.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        known = {f.name for f in fields(Cell)}
        if not isinstance(rows, list) or not all(isinstance(row, dict) and set(row) <= known for row in rows):
            raise ValueError("it is no list of rows")
        return rows
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read ({error}); expected the results of `loftq compare`") from None


def _write(path: Path, value: Any) -> None:
    replace_text(path, json.dumps(value, indent=1) + "\n")
