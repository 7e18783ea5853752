"""What running a recipe consists of, as plain data: quantize, train, evaluate, each with its arguments and command line."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loftq.config import METHODS, PUBLISHED, LoftQConfig, positive_int
from loftq.data.prepare import DataSettings
from loftq.errors import ConfigError
from loftq.evaluate.task import makes_predictions, writes_texts
from loftq.finetune.settings import TrainSettings
from loftq.recipes.local import LocalSplit
from loftq.recipes.recipe import REFERENCES, RUNNABLE, Recipe
from loftq.recipes.values import choice

QUANTIZE, TRAIN, EVALUATE = "quantize", "train", "evaluate"


@dataclass(frozen=True)
class Options:
    """How a recipe is run.

    Attributes:
        out: folder for everything that is written.
        methods: which to run; empty for those with a published number.
        model: another model than the recipe's, to shrink it. revision: of the model on the hub; by default the recipe's, and
            for another model its main branch.
        local: files in place of the hub's data set, from :func:`loftq.recipes.local.find_local`.
        limit: only the first examples of every split.
        seeds: of training; the model is quantized once a method.

    Raises:
        ConfigError: for a limit or a seed that makes no sense.
    """

    out: Path
    methods: tuple[str, ...] = ()
    model: str | None = None
    revision: str | None = None
    local: Mapping[str, LocalSplit] = field(default_factory=dict)
    limit: int | None = None
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(os.path.expanduser(self.out)))
        if self.limit is not None:
            positive_int("limit", self.limit)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"seeds is {', '.join(map(str, self.seeds)) or 'empty'}, expected different integers")
        for seed in self.seeds:
            positive_int("seed", seed, 0)

    def source(self, recipe: Recipe) -> tuple[str, str | None]:
        """The model that is run, and its revision on the hub."""
        same = self.model in (None, recipe.model)
        return self.model or recipe.model, self.revision or (recipe.revision if same else None)


@dataclass(frozen=True)
class Step:
    """One thing to do.

    Attributes:
        kind: ``quantize``, ``train`` or ``evaluate``.
        method: what of the recipe it is for. seed: of training. evaluation: which one, of an ``evaluate``.
        arguments: as JSON can hold them. ``quantize``: ``source``, ``revision``, ``out``, ``config`` (fields of
            :class:`loftq.LoftQConfig`). ``train``: ``out``, ``init_from`` or ``model``, ``revision``, ``settings`` (fields
            of :class:`loftq.finetune.settings.TrainSettings`). ``evaluate``: ``run``, ``data`` (fields of
            :class:`loftq.data.prepare.DataSettings`), ``metrics``, ``options`` (batch size and decoding),
            ``predictions`` (a file, or ``None`` where there are only likelihoods of texts).
    """

    kind: str
    method: str
    seed: int
    arguments: Mapping[str, Any]
    evaluation: str | None = None

    @property
    def name(self) -> str:
        """Such as ``evaluate/loftq/seed-0/matched``; no two steps of a run share it."""
        parts = [self.kind, self.method] if self.kind == QUANTIZE else [self.kind, self.method, f"seed-{self.seed}"]
        return "/".join([*parts, self.evaluation] if self.evaluation else parts)

    @property
    def command(self) -> str:
        """The equivalent command line."""
        given = self.arguments
        revision = ["--revision", given["revision"]] if given.get("revision") else []
        if self.kind == QUANTIZE:
            words = [given["source"], *revision, "--out", given["out"]]
            words += _quantize_options(LoftQConfig.from_dict(given["config"]))
        elif self.kind == TRAIN:
            start = (
                ["--init-from", given["init_from"]] if given["init_from"] else ["--model", given["model"], *revision]
            )
            words = [given["out"], *start, *_train_options(given["settings"])]
        else:
            words = [given["run"], *_data_options(given["data"])]
            words += ["--metrics", ",".join(given["metrics"]), *_changed(given["options"], {})]
            words += ["--predictions", given["predictions"]] if given["predictions"] else []
        return shlex.join(["loftq", self.kind, *map(str, words)])

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **dataclasses.asdict(self), "command": self.command}


def plan_steps(recipe: Recipe, options: Options) -> list[Step]:
    """The steps of a recipe in order, nothing of them done.

    Raises:
        ConfigError: a method that does not exist, or that loftq or the recipe has no way to run.
    """
    methods = options.methods or recipe.runnable()
    for method in methods:
        if method in REFERENCES:
            raise ConfigError(f"{method} is not run by loftq ({REFERENCES[method]}); leave it out of --methods")
        choice(recipe.name, "a method", method, RUNNABLE)
    if not methods:
        raise ConfigError(
            f"{recipe.name} has no published number of anything that loftq runs; name what to run with --methods"
        )
    return [step for method in dict.fromkeys(methods) for step in _steps_of(recipe, options, method)]


def _steps_of(recipe: Recipe, options: Options, method: str) -> Iterator[Step]:
    source, revision = options.source(recipe)
    folder = options.out / method
    init_from: str | None = None
    model: str | None = source
    if method in METHODS:
        init_from, model = str(folder / "quantized"), None
        config = recipe.loftq_config(method).to_dict()
        yield Step(QUANTIZE, method, 0, {"source": source, "revision": revision, "out": init_from, "config": config})
    training = dataclasses.asdict(recipe.training)
    measuring = {"batch_size": training["batch_size"]}
    if writes_texts(recipe.task, recipe.metrics):
        measuring |= {"max_new_tokens": training["max_new_tokens"] or 256, "num_beams": training["num_beams"]}
    if any(name.startswith("rouge") for name in recipe.metrics):
        measuring["rouge_stem"] = training["rouge_stem"]
    for seed in options.seeds:
        run = str(folder / f"seed-{seed}")
        settings = _settings(recipe, options, method, seed)
        start = {"init_from": init_from, "model": model, "revision": revision if model else None}
        yield Step(TRAIN, method, seed, {"out": run, **start, "settings": settings})
        for name in recipe.data.evaluate:
            arguments: dict[str, Any] = {
                "run": run,
                "data": _data(recipe, options, name),
                "metrics": list(recipe.metrics),
            }
            written = makes_predictions(recipe.task, recipe.metrics)
            file = f"{run}/predictions-{_file_part(name)}.jsonl" if written else None
            arguments |= {"options": measuring, "predictions": file}
            yield Step(EVALUATE, method, seed, arguments, name)


def _file_part(evaluation: str) -> str:
    return re.sub(r"[^\w.+-]", "_", evaluation)


def _settings(recipe: Recipe, options: Options, method: str, seed: int) -> dict[str, Any]:
    """Fields of the training settings; nothing is measured while training, since a checkpoint is not chosen by the test."""
    training = {key: value for key, value in dataclasses.asdict(recipe.training).items() if value is not None}
    training.pop("max_length", None)
    settings: dict[str, Any] = {
        "data": _data(recipe, options, None),
        "method": method if method in ("lora", "full", "qlora") else "loftq",
        **training,
        "metrics": list(recipe.metrics),
        "seed": seed,
    }
    if method == "lora":
        settings |= _adapter_settings(recipe)
    return settings


def _adapter_settings(recipe: Recipe) -> dict[str, Any]:
    """What LoRA on the original model has of a recipe: all but the quantizer."""
    if recipe.quantization is None:
        raise ConfigError(f"{recipe.name} is full fine-tuning and describes no adapter; choose another recipe for lora")
    fields = recipe.loftq_config("qlora").to_dict()
    for key in ("exclude_modules", "rank_pattern"):
        if fields[key]:
            raise ConfigError(
                f"{recipe.name} has {key}, which training an adapter on the original model does not know; leave lora out of "
                f"--methods"
            )
    found = {key: fields[key] for key in ("rank", "lora_alpha", "target_modules", "use_rslora")}
    return {**found, "lora_dropout": fields["lora_dropout"] or None}


def _data(recipe: Recipe, options: Options, evaluation: str | None) -> dict[str, Any]:
    """Fields of the data settings, for training or for one evaluation."""
    data, local = recipe.data, options.local.get(evaluation or "train")
    split = "train" if local else data.train if evaluation is None else data.evaluate[evaluation]
    return {
        "task": recipe.task,
        "data": str(local.file) if local else data.name,
        "split": split,
        "map": dict(local.map if local else data.map),
        "labels": list(data.labels) if recipe.task == "classification" else [],
        "max_length": recipe.training.max_length,
        "join_rows": data.join_rows,
        "prompt_template": data.prompt_template,
        "limit": options.limit,
    }


def _quantize_options(config: LoftQConfig) -> list[str]:
    """Options of ``loftq quantize`` that give this configuration."""
    default = LoftQConfig()
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    changed = {key: value for key, value in values.items() if value != getattr(default, key)}
    words = ["--bits", str(config.bits), "--rank", str(config.rank), "--iters", str(config.num_iter)]
    for key in ("bits", "rank", "num_iter"):
        changed.pop(key, None)
    if all(values[key] == value for key, value in PUBLISHED.items()):
        words.append("--published")
        for key in PUBLISHED:
            changed.pop(key, None)
    for key, value in changed.items():
        option = f"--{key.replace('_', '-')}"
        if key == "first_layers_bits":
            words += [option, "{}:{}".format(*value)]
        elif key == "calibration" and value is None:
            words.append("--no-calibration")
        elif key in ("bits_pattern", "rank_pattern"):
            words += [word for pattern, number in value.items() for word in (option, f"{pattern}={number}")]
        else:
            words += _option(option, value)
    return words


def _train_options(settings: Mapping[str, Any]) -> list[str]:
    """Options of ``loftq train`` that give these settings."""
    default = {f.name: f.default for f in dataclasses.fields(TrainSettings)}
    rest = {key: value for key, value in settings.items() if key not in ("data", "eval_data")}
    return [*_data_options(settings["data"]), *_changed(rest, default)]


def _data_options(data: Mapping[str, Any]) -> list[str]:
    """Options that give these data settings."""
    default = {f.name: f.default for f in dataclasses.fields(DataSettings)}
    words = ["--task", data["task"], "--data", data["data"]]
    if not DataSettings(data["task"], data["data"]).is_file:
        words += ["--split", data["split"]]
    for column, role in data["map"].items():
        words += ["--map", f"{column}={role}"]
    rest = {k: v for k, v in data.items() if k not in ("task", "data", "split", "map")}
    return [*words, *_changed(rest, default)]


def _changed(values: Mapping[str, Any], default: Mapping[str, Any]) -> list[str]:
    """Options for the values that are not the default, nor empty."""
    words: list[str] = []
    for key, value in values.items():
        same = value == default.get(key, ...) or (isinstance(value, list) and tuple(value) == default.get(key, ...))
        if value is not None and value != [] and not same:
            words += _option(f"--{key.replace('_', '-')}", value)
    return words


def _option(option: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [option] if value else [f"--no-{option.removeprefix('--')}"]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [option, ",".join(map(str, value))]
    return [option, format(value, "g") if isinstance(value, float) else str(value)]
