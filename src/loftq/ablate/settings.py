"""What an ablation measures, and on what."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn

from loftq.ablate.factors import Factors, Sweep
from loftq.checkpoint.source import Source, sha256_file
from loftq.compare import first_layers
from loftq.config import BITS, LoftQConfig, positive_int
from loftq.errors import ConfigError
from loftq.evaluate.tokens import check_apart, text_digest
from loftq.finetune.model import PLAIN
from loftq.finetune.settings import TrainSettings
from loftq.report.system import versions

_DEFAULT = LoftQConfig()


@dataclass(frozen=True)
class Ablation:
    """A sweep over one model.

    Args:
        model: folder, ``.gguf`` file or hub id. sweep: the combinations.
        text, max_tokens, window: what perplexity before fine-tuning is measured on, for causal language models; see
            :func:`loftq.evaluate.tokens.text_tokens`. ``None`` measures none.
        train: how every cell is fine-tuned, with data to measure on; its method is chosen for each cell. ``None`` trains
            none.
        block_size, scale, scale_dtype, target_modules, exclude_modules: as for :class:`loftq.LoftQConfig`, in all cells.
        calibration_samples, calibration_length, calibration_gradients: likewise, for texts of the sweep.
        seed: of every random choice. seeds: of the trainings, each cell is trained once with each; empty for ``train``'s own.
        keep: keep the quantized folders and the runs.

    Raises:
        ConfigError: for a value out of range, an impossible combination, calibration on the text that is measured, or
            training without data to measure on.
    """

    model: str
    sweep: Sweep
    text: str | None = None
    max_tokens: int | None = 16384
    window: int | None = None
    train: TrainSettings | None = None
    block_size: int = _DEFAULT.block_size
    scale: str = _DEFAULT.scale
    scale_dtype: str = _DEFAULT.scale_dtype
    target_modules: str | tuple[str, ...] = _DEFAULT.target_modules
    exclude_modules: str | tuple[str, ...] | None = None
    calibration_samples: int = _DEFAULT.calibration_samples
    calibration_length: int = _DEFAULT.calibration_length
    calibration_gradients: int = _DEFAULT.calibration_gradients
    seed: int = 0
    seeds: tuple[int, ...] = ()
    keep: bool = False

    def __post_init__(self) -> None:
        self.common()
        self.cells()
        if self.max_tokens is not None:
            positive_int("max_tokens", self.max_tokens, 2)
        for calibration in self.sweep.calibration:
            if calibration is not None and self.text is not None:
                check_apart(calibration, self.text)
        said = ", ".join(map(str, self.seeds))
        if self.seeds and self.train is None:
            raise ConfigError(f"seeds is {said}, but nothing is trained; give a task and its data too")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds is {said}, expected different ones; name each once")
        if self.train is not None:
            for seed in self.seeds:
                self.train.replace(seed=seed)  # refuses what is no seed
            if self.train.eval_data is None:
                raise ConfigError(
                    "the cells are to be trained, but there is nothing to measure them on; give eval data too"
                )

    def cells(self) -> dict[Factors, Factors]:
        """Asked for -> what is measured for it."""
        return self.sweep.cells(self.train is not None)

    def common(self, **options: Any) -> LoftQConfig:
        """What all cells are quantized with, and the rest."""
        names = {f.name for f in dataclasses.fields(LoftQConfig)} & {f.name for f in dataclasses.fields(self)}
        return LoftQConfig(**{name: getattr(self, name) for name in names}, **options)

    def calibrated_on(self, calibration: str) -> LoftQConfig:
        """The config that statistics of a text are collected by."""
        return self.common(calibration=calibration)

    def config(self, factors: Factors, model: nn.Module) -> LoftQConfig:
        """How a cell is quantized. ``model`` may be on the meta device."""
        config = self.common(
            method=factors.method,
            rank=max(1, factors.rank),
            num_iter=factors.iters,
            codebook=factors.codebook,
            damping=factors.damping,
            calibration=factors.calibration,
        )
        if factors.bits in BITS:
            return config.replace(bits=int(factors.bits))
        return first_layers(
            model, factors.bits, {n: v for n, v in config.to_dict().items() if n not in ("bits", "first_layers_bits")}
        )

    def trainings(self, factors: Factors) -> list[TrainSettings]:
        """How a cell is trained, once for each seed."""
        assert self.train is not None
        method = "qlora" if factors.method in PLAIN else "loftq"
        return [self.train.replace(method=method, seed=seed) for seed in self.seeds or (self.train.seed,)]

    def fingerprint(self, source: Source) -> dict[str, Any]:
        """What all cells of a folder have in common; values of factors may be added by a later command."""
        unused = {"sweep", "keep", "train", *(("max_tokens", "window") if self.text is None else ())}
        unused |= {"seeds"} if not self.seeds else set()  # a folder from before there were several goes on
        names = [f.name for f in dataclasses.fields(self) if f.name not in unused]
        values: dict[str, Any] = {"kind": "ablation", **{name: getattr(self, name) for name in names}}
        values["fine_tuning"] = self.train is not None
        if self.train is not None:
            for name, value in self.train.to_dict().items():
                parts = value if isinstance(value, dict) else {"": value}
                values |= {f"train {name} {part}".strip(): known for part, known in parts.items()}
            for name in ("data", "eval_data"):
                values[f"train {name} sha256"] = text_digest(getattr(self.train, name).data)
        values["loftq"] = versions()["loftq"]
        values["source"] = {file.name: sha256_file(file) for file in source.files}
        values["text_sha256"] = text_digest(self.text)
        values["calibration_sha256"] = {t: text_digest(t) for t in self.sweep.calibration if t is not None}
        return values
