"""What a training run is made of, as a frozen dataclass that checks itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loftq.config import check_alpha, is_bool, is_number, one_of, positive_int, reject_unknown
from loftq.data.prepare import DataSettings
from loftq.data.tasks import task
from loftq.errors import ConfigError

METHODS = ("loftq", "qlora", "lora", "full")
SCHEDULES = ("linear", "cosine", "constant")
DTYPES = ("auto", "float32", "bfloat16", "float16")
REPORTERS = ("none", "tensorboard", "trackio", "wandb")


@dataclass(frozen=True)
class TrainSettings:
    """How to train. The names are those of transformers' ``TrainingArguments`` where it has them.

    Args:
        data: what to train on. eval_data: what to measure on, of the same task; ``None`` for no measurement.
        method: ``loftq`` trains the fitted adapter of a quantized folder; ``qlora`` the adapter of one that
            ``--method qlora`` has quantized; ``lora`` an adapter with PEFT's initialisation on the full-precision model;
            ``full`` all weights of it. For ``lora``, rank, alpha and target modules are the quantized folder's where one is
            given, and nothing but the initialisation differs.
        epochs: passes over the data; max_steps: optimizer steps, which wins where given.
        batch_size, gradient_accumulation: their product is the number of examples of a step, whose loss is the mean over
            all their learned tokens, or over the examples where there is one label to each.
        eval_batch_size: ``None`` for ``batch_size``.
        learning_rate, schedule, warmup_ratio, weight_decay, max_grad_norm: of AdamW.
        dtype: of the frozen weights and of the products; adapters stay float32. ``auto`` is bfloat16 on a GPU that has it
            and float32 on the CPU.
        gradient_checkpointing: compute activations again in the backward pass.
        eval_steps: steps between two measurements and checkpoints; ``None`` for each epoch.
        patience: stop after so many measurements without improvement; ``None`` never.
        rank, lora_alpha, use_rslora, target_modules: of ``lora`` without a quantized folder.
        use_dora: a learned magnitude for each output (DoRA, arXiv 2402.09353).
        lora_dropout: ``None`` for what the quantized folder says.
        metrics: ``None`` for the task's own; the first decides which checkpoint is the best.
        max_new_tokens, num_beams: of texts that are generated for a metric. rouge_stem: ROUGE compares Porter's stems.
        report_to: where the curve goes besides ``training.json``.
        seed: of the order of the data, dropout and new weights.

    Raises:
        ConfigError: for a value that does not fit.
    """

    data: DataSettings
    eval_data: DataSettings | None = None
    method: str = "loftq"
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 8
    eval_batch_size: int | None = None
    gradient_accumulation: int = 1
    learning_rate: float = 1e-4
    schedule: str = "linear"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    dtype: str = "auto"
    gradient_checkpointing: bool = False
    eval_steps: int | None = None
    patience: int | None = None
    rank: int = 16
    lora_alpha: float | None = None
    use_rslora: bool = False
    target_modules: str | tuple[str, ...] = "all-linear"
    use_dora: bool = False
    lora_dropout: float | None = None
    metrics: tuple[str, ...] | None = None
    max_new_tokens: int = 256
    num_beams: int = 1
    rouge_stem: bool = True
    report_to: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.data, DataSettings):
            raise ConfigError(f"data is {self.data!r}, expected DataSettings")
        one_of("method", self.method, METHODS)
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("dtype", self.dtype, DTYPES)
        one_of("report_to", self.report_to, REPORTERS)
        for name in ("batch_size", "gradient_accumulation", "rank", "max_new_tokens", "num_beams"):
            positive_int(name, getattr(self, name))
        for name in ("max_steps", "eval_batch_size", "eval_steps", "patience"):
            if getattr(self, name) is not None:
                positive_int(name, getattr(self, name))
        for name in ("epochs", "learning_rate", "max_grad_norm"):
            if not is_number(getattr(self, name)) or getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected a positive number")
        if not is_number(self.weight_decay) or self.weight_decay < 0:
            raise ConfigError(f"weight_decay is {self.weight_decay!r}, expected a number of at least 0")
        if not is_number(self.warmup_ratio) or not 0 <= self.warmup_ratio < 1:
            raise ConfigError(f"warmup_ratio is {self.warmup_ratio!r}, expected a number from 0 to below 1")
        if self.lora_dropout is not None and not (is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1):
            raise ConfigError(f"lora_dropout is {self.lora_dropout!r}, expected a number from 0 to below 1")
        check_alpha(self.lora_alpha)
        if positive_int("seed", self.seed, 0) >= 2**32:  # numpy's limit
            raise ConfigError(f"seed is {self.seed}, expected less than 4294967296 (2^32)")
        is_bool("gradient_checkpointing", self.gradient_checkpointing)
        is_bool("use_rslora", self.use_rslora)
        is_bool("use_dora", self.use_dora)
        is_bool("rouge_stem", self.rouge_stem)
        if self.use_dora and self.method == "full":
            raise ConfigError("use_dora is on, but the method full has no adapter; choose one")
        if isinstance(self.metrics, list):
            object.__setattr__(self, "metrics", tuple(self.metrics))
        if self.metrics is not None and not self.metrics:
            raise ConfigError("metrics names none, expected at least one; leave it out for the task's own")
        if isinstance(self.target_modules, list):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if self.eval_data is None:
            if self.patience is not None:
                raise ConfigError("patience is given, but there is nothing to measure on; give eval data too")
        elif self.eval_data.task != self.data.task:
            raise ConfigError(
                f"eval_data is of the task {self.eval_data.task}, expected {self.data.task} as in the training data"
            )

    @property
    def metric_names(self) -> tuple[str, ...]:
        """What is measured, the deciding metric first."""
        return self.metrics or task(self.data.task).metrics

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values |= {"data": self.data.to_dict(), "eval_data": self.eval_data and self.eval_data.to_dict()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainSettings:
        reject_unknown("training", values, [f.name for f in dataclasses.fields(cls)])
        if "data" not in values:
            raise ConfigError("the training settings have no data, expected what to train on; add it")
        found = dict(values)
        for name in ("data", "eval_data"):
            if isinstance(found.get(name), Mapping):
                found[name] = DataSettings.from_dict(found[name])
        return cls(**found)

    def replace(self, **changes: Any) -> TrainSettings:
        return dataclasses.replace(self, **changes)
