"""One experiment as a frozen dataclass, and its strict reading from a mapping."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loftq.config import METHODS, PUBLISHED, LoftQConfig, is_bool, one_of, reject_unknown
from loftq.data.language import PROMPT, checked_template
from loftq.errors import ConfigError
from loftq.recipes import values as read

TASKS = ("causal", "completion", "chat", "classification", "regression", "qa", "summarization")
SCHEDULES = ("linear", "cosine", "constant")
RUNNABLE = (*METHODS, "lora", "full")
"""What a recipe can be run with: every initialisation of ``loftq quantize``, LoRA in full precision, full fine-tuning."""
REFERENCES = {
    "losparse": "LoSparse (arXiv 2306.11222), pruning: its published numbers only, loftq does not prune",
    "lead-3": "the document's first three sentences: its published numbers only, nothing is trained",
}
"""What the paper compares with and loftq does not run."""


@dataclass(frozen=True)
class Data:
    """Where the examples come from.

    Attributes:
        id, config: the data set on the hub and its configuration.
        train: split to train on.
        evaluate: name of an evaluation -> split, such as ``matched`` -> ``validation_matched``.
        map: column -> role.
        labels: names of the classes in the order of their numbers.
        prompt_template: what a prompt is put into, with ``{prompt}`` in its place.
        join_rows: rows are the lines of one text, as :class:`loftq.data.prepare.DataSettings` has it.
        local: split -> names or patterns of its file in a local folder, beside the usual ones; see :mod:`loftq.recipes.local`.
        local_maps: further maps that a local file's columns may fit; a column of a file without a header is its number,
            counted from 0, as text.
    """

    id: str
    train: str
    evaluate: Mapping[str, str]
    map: Mapping[str, str]
    config: str | None = None
    labels: tuple[str, ...] = ()
    prompt_template: str = PROMPT
    join_rows: bool = False
    local: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    local_maps: tuple[Mapping[str, str], ...] = ()

    @property
    def name(self) -> str:
        """``id`` or ``id:config``, as ``loftq train --data`` takes it."""
        return self.id if self.config is None else f"{self.id}:{self.config}"


@dataclass(frozen=True)
class Training:
    """How an adapter is trained; the fields mean what they mean in the settings of ``loftq train``.

    ``batch_size`` is what one step of the optimizer sees in the paper. To fit it into less memory, divide it between
    ``batch_size`` and ``gradient_accumulation``.
    """

    epochs: float
    batch_size: int
    learning_rate: float
    gradient_accumulation: int = 1
    max_steps: int | None = None
    schedule: str = "linear"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    max_length: int | None = None
    max_new_tokens: int | None = None
    num_beams: int = 1
    rouge_stem: bool = True


Numbers = Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True)
class Recipe:
    """One experiment: what is trained on what, how, and what was published.

    Attributes:
        name: such as ``glue/mnli-nf2-r16``.
        table: where its numbers were published.
        model: hub id. revision: of it; ``None`` for its main branch.
        task: of :data:`TASKS`.
        data, training: see :class:`Data`, :class:`Training`.
        metrics: in the order of the published table.
        published: method -> metric -> number as printed (percent, but for perplexity); ``None`` where the paper says N.A.
            A metric is ``evaluation/metric``, or ``metric`` over all evaluations together.
        quantization: fields of :class:`loftq.LoftQConfig` beside the papers' quantizer; ``None`` where nothing is
            quantized and no adapter is trained. ``lora`` takes the adapter's fields alone.
        published_size: ``compression_ratio``, (backbone + adapters) / pretrained size, and ``trainable_ratio``, in percent.
        seeds: over how many the published number is the median.
        unstated: dotted key -> where its value is from, for what the paper does not state.
        notes: sentences.
    """

    name: str
    table: str
    model: str
    task: str
    data: Data
    training: Training
    metrics: tuple[str, ...]
    published: Numbers = field(default_factory=dict)
    quantization: Mapping[str, Any] | None = None
    published_size: Mapping[str, float] = field(default_factory=dict)
    seeds: int | None = None
    revision: str | None = None
    unstated: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def loftq_config(self, method: str, seed: int = 0) -> LoftQConfig:
        """How the model is quantized for a method: the papers' quantizer, LAPACK's SVD, and what the recipe says.

        Raises:
            ConfigError: if the recipe quantizes nothing, or says what :class:`loftq.LoftQConfig` refuses.
        """
        one_of("method", method, METHODS)
        if self.quantization is None:
            raise ConfigError(
                f"{self.name} is full fine-tuning and says nothing of quantization; choose another recipe for {method}"
            )
        fields = {**PUBLISHED, "svd": "exact", **self.quantization, "method": method, "seed": seed}
        return LoftQConfig.from_dict(fields)

    def runnable(self) -> tuple[str, ...]:
        """The methods with a published number that loftq can run."""
        known = [m for m, numbers in self.published.items() if any(n is not None for n in numbers.values())]
        return tuple(m for m in known if m in RUNNABLE)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **_plain(dataclasses.asdict(self))}


def parse_recipe(name: str, values: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from what YAML holds; ``where`` names the file in messages.

    Raises:
        ConfigError: an unknown or missing key or a wrong value, in one sentence with the file and the key.
    """
    known = [f.name for f in dataclasses.fields(Recipe) if f.name != "name"]
    read.keys(where, values, known, ("table", "model", "task", "data", "training", "metrics"))
    data = _data(f"{where}: data", read.mapping(where, "data", values["data"]))
    metrics = read.texts(where, "metrics", values["metrics"], empty=False)
    recipe = Recipe(
        name=name,
        table=read.text(where, "table", values["table"]),
        model=read.text(where, "model", values["model"]),
        revision=read.optional(read.text, where, "revision", values.get("revision")),
        task=read.choice(where, "task", values["task"], TASKS),
        data=data,
        training=_training(f"{where}: training", read.mapping(where, "training", values["training"])),
        metrics=metrics,
        published=_published(where, values.get("published") or {}, metrics, data.evaluate),
        quantization=_quantization(where, values.get("quantization")),
        published_size=_published_size(where, values.get("published_size")),
        seeds=read.optional(read.count, where, "seeds", values.get("seeds")),
        unstated=read.text_mapping(where, "unstated", values.get("unstated") or {}),
        notes=read.texts(where, "notes", values.get("notes") or []),
    )
    for key in recipe.unstated:
        _known_key(where, key)
    return recipe


def _data(where: str, values: Mapping[str, Any]) -> Data:
    read.keys(where, values, [f.name for f in dataclasses.fields(Data)], ("id", "train", "evaluate", "map"))
    evaluate = values["evaluate"]
    if isinstance(evaluate, str):
        evaluate = {evaluate: evaluate}
    local = read.mapping(where, "local", values.get("local") or {})
    maps = values.get("local_maps") or []
    if not isinstance(maps, list):
        raise ConfigError(f"{where}: local_maps is {maps!r}, expected a list of mappings from column to role")
    return Data(
        id=read.text(where, "id", values["id"]),
        train=read.text(where, "train", values["train"]),
        evaluate=read.text_mapping(where, "evaluate", evaluate, empty=False),
        map=read.text_mapping(where, "map", values["map"], empty=False),
        config=read.optional(read.text, where, "config", values.get("config")),
        labels=read.texts(where, "labels", values.get("labels") or []),
        prompt_template=checked_template(read.text(where, "prompt_template", values.get("prompt_template", PROMPT))),
        join_rows=is_bool(f"{where}: join_rows", values.get("join_rows", False)),
        local={str(k): read.texts(where, f"local.{k}", v, empty=False) for k, v in local.items()},
        local_maps=tuple(read.text_mapping(where, "local_maps", m, empty=False) for m in maps),
    )


def _training(where: str, values: Mapping[str, Any]) -> Training:
    read.keys(where, values, [f.name for f in dataclasses.fields(Training)], ("epochs", "batch_size", "learning_rate"))
    kinds = {
        "epochs": read.positive,
        "batch_size": read.count,
        "learning_rate": read.positive,
        "gradient_accumulation": read.count,
        "max_steps": read.count,
        "warmup_ratio": read.share,
        "weight_decay": read.share,
        "max_length": read.count,
        "max_new_tokens": read.count,
        "num_beams": read.count,
    }
    given: dict[str, Any] = {}
    for key, value in values.items():
        if key == "schedule":
            given[key] = read.choice(where, key, value, SCHEDULES)
        elif key == "rouge_stem":
            given[key] = is_bool(f"{where}: {key}", value)
        elif value is not None or key not in ("max_steps", "max_length", "max_new_tokens"):
            given[key] = kinds[key](where, key, value)
    return Training(**given)


def _published(where: str, values: Any, metrics: tuple[str, ...], evaluations: Mapping[str, str]) -> Numbers:
    result = {}
    for method, numbers in read.mapping(where, "published", values).items():
        read.choice(where, "a method of published", method, (*RUNNABLE, *REFERENCES))
        key = f"published.{method}"
        found: dict[str, float | None] = {}
        for metric, number in read.mapping(where, key, numbers).items():
            evaluation, slash, plain = str(metric).rpartition("/")
            read.choice(where, f"a metric of {key}", plain, metrics)
            if slash:
                read.choice(where, f"an evaluation of {key}", evaluation, tuple(evaluations))
            found[str(metric)] = read.optional(read.positive, where, f"{key}.{metric}", number)
        result[str(method)] = found
    return result


def _published_size(where: str, values: Any) -> dict[str, float]:
    sizes = read.mapping(where, "published_size", values or {})
    read.keys(f"{where}: published_size", sizes, ("compression_ratio", "trainable_ratio"), ())
    return {k: read.positive(where, f"published_size.{k}", v) for k, v in sizes.items()}


def _quantization(where: str, values: Any) -> dict[str, Any] | None:
    if values is None:
        return None
    fields = dict(read.mapping(where, "quantization", values))
    try:
        for key in ("method", "seed"):
            if key in fields:
                raise ConfigError(f"{key} is chosen when a recipe is run, leave it out")
        LoftQConfig.from_dict({**PUBLISHED, **fields})
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{where}: quantization: {error}") from None
    return fields


def _known_key(where: str, key: str) -> None:
    section, dot, name = key.partition(".")
    sections = {"training": Training, "data": Data, "quantization": LoftQConfig}
    if not dot or section not in sections:
        raise ConfigError(f"{where}: unstated has {key!r}, expected a key such as training.weight_decay")
    reject_unknown(f"{where}: unstated: {section}", [name], [f.name for f in dataclasses.fields(sections[section])])


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON holds them."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
