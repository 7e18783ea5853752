"""What a user can choose about a refinement."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from loftq.config import is_bool, is_number, one_of, positive_int
from loftq.errors import ConfigError

STAGES = ("blocks", "model")
LOSSES = ("kl", "rilq")
DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class RefineSettings:
    """How adapters are tuned.

    Args:
        stages: ``blocks`` (block by block, ApiQ-bw, arXiv 2402.05147), then ``model`` (all together); either, or both.
        loss: of the stage ``model``: ``kl``, the divergence of the next-token distribution from the full-precision
            model's; or ``rilq``, half the relative squared error of the last hidden state and half the cross entropy of
            the next token (RILQ, arXiv 2412.01129).
        samples, length: windows of the text, and tokens in each; by default 512, or the model's positions if fewer.
        epochs: passes over the windows in the stage ``model``. block_epochs: passes for each block.
        max_tokens: the stage ``model`` stops after training on so many.
        batch_tokens: tokens of one step, at least one window.
        learning_rate: the highest, of A and B. scales_learning_rate: of the scales' factors.
        scales: tune the stored scales as well.
        holdout: share of the windows, the last ones, that nothing is trained on.
        patience: evaluations without a better result until the stage ``model`` stops.
        seed: of the order of the windows.
        dtype: of the products: ``bfloat16``, ``float32``, or ``auto`` for bfloat16 where the processor has it.

    Raises:
        ConfigError: for a value that makes no sense.
    """

    stages: tuple[str, ...] = STAGES
    loss: str = "kl"
    samples: int = 64
    length: int | None = None
    epochs: int = 2
    block_epochs: int = 2
    max_tokens: int | None = None
    batch_tokens: int = 512
    learning_rate: float = 2e-4
    scales_learning_rate: float = 1e-3
    scales: bool = False
    holdout: float = 0.1
    patience: int = 3
    seed: int = 0
    dtype: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages or list(self.stages) != [s for s in STAGES if s in self.stages]:
            raise ConfigError(
                f"stages is {', '.join(self.stages) or 'empty'}, expected blocks, model, or both in this order"
            )
        one_of("loss", self.loss, LOSSES)
        one_of("dtype", self.dtype, DTYPES)
        is_bool("scales", self.scales)
        positive_int("samples", self.samples, 2)
        if self.length is not None:
            positive_int("length", self.length, 2)
        for name in ("epochs", "block_epochs", "batch_tokens", "patience"):
            positive_int(name, getattr(self, name))
        positive_int("seed", self.seed, 0)
        if self.max_tokens is not None:
            positive_int("max_tokens", self.max_tokens)
        for name in ("learning_rate", "scales_learning_rate"):
            value = getattr(self, name)
            if not is_number(value) or value <= 0:
                raise ConfigError(f"{name} is {value!r}, expected a positive number")
        if not is_number(self.holdout) or not 0 < self.holdout < 1:
            raise ConfigError(f"holdout is {self.holdout!r}, expected a share between 0 and 1, such as 0.1")

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
