"""What running a recipe would do, with everything built that needs no weights and no data."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loftq.checkpoint.source import read_config
from loftq.config import LoftQConfig
from loftq.data.prepare import DataSettings, positions
from loftq.errors import ConfigError
from loftq.finetune.settings import TrainSettings
from loftq.recipes.recipe import Recipe
from loftq.recipes.steps import EVALUATE, QUANTIZE, TRAIN, Options, Step, plan_steps


@dataclass(frozen=True)
class ModuleSummary:
    """What of a model a quantization packs.

    Attributes:
        modules: their number. weights: in them. bits: width of the codes -> number of modules.
        code_bits: average width of the codes. adapter_parameters: of A and B together.
        other_weights: that stay as they are.
    """

    modules: int
    weights: int
    bits: Mapping[int, int]
    code_bits: float
    adapter_parameters: int
    other_weights: int


def module_summary(model: str, config: LoftQConfig, revision: str | None = None) -> ModuleSummary | None:
    """The modules that a configuration selects of a model, from its ``config.json`` alone; ``None`` if that is not here.

    ``model`` is a folder, or a hub id whose configuration at ``revision`` is in the cache. Nothing is downloaded.

    Raises:
        SourceError: a configuration that transformers cannot build.
        ConfigError: see :func:`loftq.plan.targets.plan_modules`.
    """
    folder = _config_folder(model, revision)
    if folder is None:
        return None
    from loftq.checkpoint.naming import meta_model
    from loftq.plan.targets import plan_modules

    built = meta_model(read_config(folder))
    plans = list(plan_modules(built, config).values())
    bits: dict[int, int] = {}
    for plan in plans:
        bits[plan.spec.bits] = bits.get(plan.spec.bits, 0) + 1
    sizes = [plan.numel for plan in plans]
    return ModuleSummary(
        modules=len(plans),
        weights=sum(sizes),
        bits=bits,
        code_bits=sum(size * plan.spec.bits for size, plan in zip(sizes, plans, strict=True)) / sum(sizes),
        adapter_parameters=sum(plan.rank * sum(plan.shape) * max(1, plan.experts) for plan in plans),
        other_weights=sum(p.numel() for p in built.parameters()) - sum(sizes),
    )


def _config_folder(model: str, revision: str | None) -> Path | None:
    folder = Path(os.path.expanduser(model))
    if folder.is_dir():
        return folder
    if folder.is_file():  # GGUF, which has no config.json
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        raise ConfigError(f"{model} does not exist, expected a model's folder or a hub id") from None
    return Path(cached).parent if isinstance(cached, str) else None


def check_lengths(recipe: Recipe, options: Options, steps: Iterable[Step]) -> None:
    """Refuse inputs and generated texts that are longer than the model, where its ``config.json`` is on this machine.

    Raises:
        ConfigError: the first of them. SourceError: a configuration that transformers cannot build.
    """
    folder = _config_folder(*options.source(recipe))
    if folder is None:
        return
    config = read_config(folder)
    limit = positions(config, writing=True)
    for step in steps:
        given = step.arguments
        if step.kind == QUANTIZE:
            continue
        DataSettings.from_dict(given["settings"]["data"] if step.kind == TRAIN else given["data"]).length(config)
        new = given["options"].get("max_new_tokens", 0) if step.kind == EVALUATE else 0
        if limit is not None and new > limit:
            raise ConfigError(
                f"max_new_tokens is {new}, but the model has {limit} positions; lower it with --set training.max_new_tokens=N"
            )


@dataclass(frozen=True)
class DryRun:
    """What a run would do.

    Attributes:
        recipe, options, steps: see there.
        modules: method -> what its quantization packs, for the methods that quantize; ``None`` where the model's
            configuration is not on this machine.
    """

    recipe: Recipe
    options: Options
    steps: tuple[Step, ...]
    modules: Mapping[str, ModuleSummary | None]

    def to_dict(self) -> dict[str, Any]:
        local = {
            name: asdict(replace(split, map=dict(split.map))) | {"file": str(split.file)}
            for name, split in self.options.local.items()
        }
        source, revision = self.options.source(self.recipe)
        return {
            "recipe": self.recipe.to_dict(),
            "model": source,
            "revision": revision,
            "local": local,
            "modules": {method: found and asdict(found) for method, found in self.modules.items()},
            "steps": [step.to_dict() for step in self.steps],
        }


def dry_run(recipe: Recipe, options: Options) -> DryRun:
    """Build the configurations, the training settings and, where the model's configuration is here, the module plan.

    Raises:
        ConfigError, SourceError: what a run would stumble over.
    """
    steps = plan_steps(recipe, options)
    check_lengths(recipe, options, steps)
    modules = {}
    for step in steps:
        if step.kind == QUANTIZE:
            config = LoftQConfig.from_dict(step.arguments["config"])
            modules[step.method] = module_summary(step.arguments["source"], config, step.arguments["revision"])
        elif step.kind == TRAIN:
            TrainSettings.from_dict(step.arguments["settings"])
        else:
            DataSettings.from_dict(step.arguments["data"])
    return DryRun(recipe, options, tuple(steps), modules)
