"""``training.json``: what a run did, and with what."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loftq.checkpoint.writer import replace_text
from loftq.data.prepare import DataSettings
from loftq.errors import SourceError
from loftq.finetune.places import Places, locate
from loftq.finetune.settings import TrainSettings

RECORD = "training.json"


@dataclass
class TrainingRecord:
    """One run.

    Attributes:
        settings: the :class:`TrainSettings` as a dict. base: the model that was trained; revision: of it on the hub, where
            one was named; init_from: the quantized folder whose adapter settings held; backbone_sha256: of the packed
            backbone, where there is one. places: where the folders and files among these names lie, see
            :mod:`loftq.finetune.places`; the names are as they were typed.
        labels: the classes in the order of their numbers. heads: modules that were trained from scratch.
        trainable, parameters: counted weights. data, eval_data: rows, examples and tokens, and what ROUGE is taken with.
        curve: a dict for each step: step, epoch, loss, learning_rate, grad_norm.
        evaluations: a dict for each measurement: step, epoch, metric -> value.
        before, after: metrics at the start and of the result.
        best_step: the step that was kept. status: ``finished``, ``stopped early`` or ``diverged: …``.
        predictions: file of the result's predictions, if there are any.
    """

    settings: dict[str, Any]
    base: str
    init_from: str | None
    backbone_sha256: str | None
    labels: list[str] | None
    heads: list[str]
    trainable: int
    parameters: int
    data: dict[str, Any]
    eval_data: dict[str, Any] | None
    notes: list[str] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    before: dict[str, float] | None = None
    after: dict[str, float] | None = None
    best_step: int | None = None
    status: str = "unfinished"
    predictions: str | None = None
    revision: str | None = None
    places: Places = field(default_factory=dict)
    command: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    timing: dict[str, Any] = field(default_factory=dict)

    @property
    def train_settings(self) -> TrainSettings:
        return TrainSettings.from_dict(self.settings)

    def data_settings(self, folder: str | Path) -> DataSettings:
        """What the run in ``folder`` was measured on, or else trained on, by a name that leads there from here."""
        return self.located(folder, self.train_settings.eval_data or self.train_settings.data)

    def located(self, folder: str | Path, data: DataSettings) -> DataSettings:
        """Data of the run in ``folder``, by a name that leads there from here."""
        return data.replace(data=locate(Path(folder), data.data, self.places))

    def to_dict(self) -> dict[str, Any]:
        return _without_nan(asdict(self))

    def save(self, folder: Path) -> None:
        """Write the file; an earlier one is replaced at once or not at all."""
        replace_text(folder / RECORD, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> TrainingRecord:
        """Read a run's record.

        Raises:
            SourceError: there is none, or a damaged one.
        """
        path = Path(folder) / RECORD
        if not path.is_file():
            raise SourceError(f"{folder} has no {RECORD}, expected a folder that `loftq train` has written")
        try:
            record = cls(**json.loads(path.read_text(encoding="utf-8")))
            record.train_settings  # noqa: B018 - refuses what is no setting
            if not all(isinstance(known, dict) for known in record.places.values()):
                raise ValueError("its places are no paths")
            return record
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise SourceError(f"{path} is damaged ({error}); train again") from None


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
