"""What a refinement did, saved as ``loftq_refinement.json`` beside the quantization's report."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loftq.checkpoint.source import read_json
from loftq.checkpoint.writer import replace_text

REFINEMENT = "loftq_refinement.json"


@dataclass(frozen=True)
class StageRecord:
    """One stage.

    Attributes:
        name: ``blocks`` or ``model``.
        before, after: the distance from the full-precision model on the held-out windows; ``after`` is what the stage
            arrived at, whether or not it was kept.
        kept: whether it was an improvement. If not, the adapters were put back.
        steps, tokens: optimizer steps, and tokens that every trained layer saw.
        curve: for ``blocks``, one entry a block with its held-out error before and after; for ``model``, entries with
            step, training loss and held-out distance.
    """

    name: str
    before: float
    after: float
    kept: bool
    steps: int
    tokens: int
    curve: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class RefinementReport:
    """What was tuned, on what, and what came of it.

    Attributes:
        changed: whether the folder's adapter is another one now. It never is when nothing was an improvement.
        metric: ``kl``, the mean Kullback-Leibler divergence in nats per token of the next-token distribution from the
            full-precision model's; for a model without such a head ``hidden``, the squared error of the last hidden state
            relative to its size.
        before, after: the metric on the held-out windows, of the folder as it was and as it is.
        stages: in the order in which they ran.
        text: name, sha256 of the tokens, and how many windows of what length were trained on and held out.
        settings: the :class:`~loftq.refine.RefineSettings` as a dict, with the dtype that ``auto`` stood for.
        source: name and hashes of the full-precision model.
        backbone_sha256, adapter_sha256: of the result. previous: of what it was made from.
        versions, command, seconds, peak_memory_bytes: how it ran.
    """

    changed: bool
    metric: str
    before: float
    after: float
    stages: list[StageRecord]
    text: dict[str, Any]
    settings: dict[str, Any]
    source: dict[str, Any]
    backbone_sha256: str
    adapter_sha256: str
    previous: dict[str, str]
    versions: dict[str, str]
    command: str | None = None
    seconds: float = 0.0
    peak_memory_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, directory: Path) -> None:
        replace_text(directory / REFINEMENT, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> RefinementReport:
        """Read a folder's last refinement.

        Raises:
            SourceError: there is none.
        """
        values = read_json(Path(directory) / REFINEMENT)
        return cls(**{**values, "stages": [StageRecord(**stage) for stage in values["stages"]]})
