"""One call from the name of a data set to the examples of a task."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loftq.config import is_bool, one_of, positive_int, reject_unknown
from loftq.data.chat import chat_examples
from loftq.data.examples import Examples
from loftq.data.formats import LeftOut
from loftq.data.labels import class_numbers, classification_examples, label_names, regression_examples
from loftq.data.language import (
    PROMPT,
    causal_examples,
    checked_template,
    completion_examples,
    joined_examples,
    pack,
)
from loftq.data.questions import question_examples
from loftq.data.roles import Roles
from loftq.data.rows import Row, read_rows
from loftq.data.stored import stored_examples
from loftq.data.summaries import summary_examples
from loftq.data.tasks import TASKS, task
from loftq.errors import ConfigError, SourceError
from loftq.evaluate.models import load_tokenizer
from loftq.evaluate.tokens import is_stored, stored_tokens

DEFAULT_LENGTH = {"causal": 512, "completion": 512, "chat": 1024, "qa": 384, "summarization": 512}
"""``max_length`` of a task where none is given, or the model's positions if fewer; 128 for the others."""


@dataclass(frozen=True)
class DataSettings:
    """What to train or measure on.

    Args:
        task: a name of :data:`loftq.data.tasks.TASKS`.
        data: file, folder of splits, or hub data set (``ID`` or ``ID:CONFIG``). For the task causal also
            ``FILE.safetensors:KEY``, token ids that need no tokenizer.
        split: of a folder or a hub data set.
        map: column -> role, for columns whose names are not the usual ones; numbers for a file without header.
        labels: the classes of a classification in the order of their numbers; empty to take them from the training data.
        max_length: tokens of an input; ``None`` for the task's usual length.
        max_target_length: tokens of a summary. doc_stride: tokens that neighbouring windows of a context share;
            ``None`` for 128, or a third of ``max_length`` if that is less.
        packing: several texts to a window. ``None``: for running text only.
        join_rows: rows of running text are the lines or paragraphs of one text: a blank line is put between them, and no
            end-of-text token.
        prompt_template: what a prompt (for summarization the text) is put into, with ``{prompt}`` in its place.
        limit: use the first rows only.

    Raises:
        ConfigError: for a value that does not fit.
    """

    task: str
    data: str
    split: str = "train"
    map: Mapping[str, str] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    max_length: int | None = None
    max_target_length: int = 128
    doc_stride: int | None = None
    packing: bool | None = None
    join_rows: bool = False
    prompt_template: str = PROMPT
    limit: int | None = None

    def __post_init__(self) -> None:
        one_of("task", self.task, TASKS)
        if not isinstance(self.data, (str, Path)) or not str(self.data):
            raise ConfigError(f"data is {self.data!r}, expected a file, a folder of splits or a hub data set")
        object.__setattr__(self, "data", str(self.data))
        if not isinstance(self.map, Mapping):
            raise ConfigError(f"map is {self.map!r}, expected a mapping from columns to roles")
        object.__setattr__(self, "map", {str(column): str(role) for column, role in self.map.items()})
        if not isinstance(self.labels, (list, tuple)) or not all(
            isinstance(name, str) and name for name in self.labels
        ):
            raise ConfigError(f"labels is {self.labels!r}, expected names of classes")
        object.__setattr__(self, "labels", tuple(self.labels))
        if self.labels and (
            self.task != "classification" or len(set(self.labels)) != len(self.labels) or len(self.labels) < 2
        ):
            raise ConfigError(
                f"labels is {', '.join(self.labels)}, expected at least two different names, for the task classification"
            )
        for name in ("max_length", "limit", "doc_stride"):
            if getattr(self, name) is not None:
                positive_int(name, getattr(self, name), 2 if name == "max_length" else 1)
        positive_int("max_target_length", self.max_target_length, 2)
        if self.packing is not None:
            is_bool("packing", self.packing)
        if self.packing and not task(self.task).is_causal:
            raise ConfigError(f"packing is on, but the task {self.task} has one text an input; turn it off")
        is_bool("join_rows", self.join_rows)
        if self.join_rows and (self.task != "causal" or self.is_stored or self.packing is False):
            raise ConfigError(
                "join_rows is on, but makes one stream of the texts of the task causal, with packing; turn it off"
            )
        checked_template(self.prompt_template)

    @property
    def is_stored(self) -> bool:
        """Whether the data are token ids."""
        return self.task == "causal" and is_stored(self.data)

    @property
    def is_file(self) -> bool:
        """Whether the data are a single file, which has no splits."""
        return self.is_stored or os.path.isfile(os.path.expanduser(self.data))

    def is_of_rows_of(self, other: DataSettings) -> bool:
        """Whether both read the same file, or the same split of a folder or a hub data set."""
        here, there = (os.path.realpath(os.path.expanduser(s.data)) for s in (self, other))
        return here == there and (self.is_file or self.split == other.split)

    def notice_of_training_on(self, trained: DataSettings) -> list[str]:
        """A sentence where a model is measured on these rows after training on them."""
        if not self.is_of_rows_of(trained):
            return []
        return [
            f"{self.data} is both trained and measured on, so the metrics do not say how the model does on new rows"
        ]

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "labels": list(self.labels)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataSettings:
        reject_unknown("data", values, [f.name for f in dataclasses.fields(cls)])
        for name in ("task", "data"):
            if name not in values:
                raise ConfigError(f"the data settings have no {name}, expected at least task and data; add it")
        return cls(**values)

    def replace(self, **changes: Any) -> DataSettings:
        return dataclasses.replace(self, **changes)

    def to_measure(self) -> DataSettings:
        """The same data as they are measured on: packed only where they are running text, and packing is not off."""
        apart = self.task == "causal" and self.packing is False and not self.is_stored
        return self.replace(packing=False if apart else None)

    def length(self, config: Any | None) -> int:
        """Tokens of an input for a model of this config.

        Raises:
            ConfigError: ``max_length`` is beyond the model's positions.
        """
        limit = positions(config)
        usual = DEFAULT_LENGTH.get(self.task, 128)
        wanted = self.max_length or min(usual, limit or usual)
        if limit is not None and wanted > limit:
            raise ConfigError(
                f"max_length is {wanted}, but the model has {limit} positions; lower it to at most {limit}"
            )
        return wanted


def positions(config: Any | None, *, writing: bool = False) -> int | None:
    """How many tokens a model can see, if its config limits them.

    Args:
        writing: what an encoder-decoder writes, where the limit of its decoder is another than that of its encoder.
    """
    if config is None:
        return None
    half: Any = getattr(config, "decoder" if writing else "encoder", None)
    part: Any = (half if hasattr(half, "model_type") else config).get_text_config()
    limit = getattr(part, "max_position_embeddings", None)
    offset = (part.pad_token_id or 0) + 1 if part.model_type in OFFSET_POSITIONS else 0
    return limit - offset if isinstance(limit, int) and limit > 0 else None


OFFSET_POSITIONS = (
    "camembert",
    "data2vec-text",
    "esm",
    "ibert",
    "layoutlmv3",
    "lilt",
    "longformer",
    "luke",
    "markuplm",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
"""Families of RoBERTa's kind, which number positions from the padding token's id + 1: so many fewer are for tokens."""


def rows_of(settings: DataSettings, left_out: LeftOut = lambda where: None) -> Iterable[Row]:
    """The rows of a data set by role, read as they are asked for.

    Args:
        left_out: told the place of each line that a known file is read without.

    Raises:
        SourceError, ConfigError: see :func:`loftq.data.rows.read_rows` and :class:`loftq.data.roles.Roles`.
    """
    numbered = bool(settings.map) and all(column.isdigit() for column in settings.map)
    rows = iter(
        read_rows(settings.data, split=settings.split, numbered=numbered, limit=settings.limit, left_out=left_out)
    )
    first = next(rows)
    roles = Roles.find(task(settings.task), first, settings.map)
    return roles.apply(itertools.chain([first], rows))


def check_rows(settings: DataSettings) -> None:
    """Read all rows of a data set as :func:`prepare` would, but without a model.

    Raises:
        SourceError, ConfigError: a row, or a setting, that does not fit.
    """
    rows = rows_of(settings)
    for _ in class_numbers(rows, settings.labels, "the classes asked for") if settings.labels else rows:
        pass


def prepare(
    settings: DataSettings, tokenizer: Any, config: Any | None = None, *, labels: Sequence[str] | None = None
) -> tuple[Examples, list[str] | None]:
    """The examples of a split.

    Args:
        tokenizer: of the model; ``None`` will do for token ids. config: of the model, for its number of positions.
        labels: the classes in the order of their numbers, where a training split has decided them already.

    Returns:
        The examples, and for classification the classes.

    Raises:
        SourceError: a row that does not fit, by file and line. ConfigError: a setting that does not fit the model.
    """
    length = settings.length(config)
    limit = positions(config, writing=True)
    if settings.task == "summarization" and limit is not None and settings.max_target_length > limit:
        raise ConfigError(
            f"max_target_length is {settings.max_target_length}, but the model has {limit} positions; lower it to at most "
            f"{limit}"
        )
    if settings.is_stored:
        return _stored(settings, length, config), None
    incomplete: list[str] = []
    rows = rows_of(settings, incomplete.append)
    if settings.task == "classification":
        labels = labels or settings.labels
        if not labels:
            rows = list(rows)
            labels = label_names(rows)
        known = "--labels" if settings.labels else "the training data"
        found = classification_examples(rows, tokenizer, length, labels, where_names=known)
        found.incomplete = incomplete
        return found.checked(settings.data), list(labels)
    found = _builder(settings, tokenizer, length)(rows).checked(settings.data)
    found.incomplete = incomplete
    if settings.packing and settings.task != "causal":
        found = pack(found)
    return found, None


def _stored(settings: DataSettings, length: int, config: Any | None) -> Examples:
    if settings.packing is False or settings.limit is not None:
        raise ConfigError(
            f"{settings.data} is one stream of token ids, which is cut into windows; leave out the limit, and packing on"
        )
    ids = stored_tokens(settings.data)
    assert ids is not None
    return stored_examples(ids, settings.data, length, config)


def tokenizer_for(model: str, *settings: DataSettings | None, revision: str | None = None) -> Any:
    """The tokenizer beside a model; ``None`` where there is none and only token ids are read. ``revision``: of a hub id.

    Raises:
        SourceError: there is none, and texts are read.
    """
    try:
        return load_tokenizer(model, revision)
    except SourceError:
        if all(s is None or s.is_stored for s in settings):
            return None
        raise


def _builder(settings: DataSettings, tokenizer: Any, length: int) -> Callable[[Iterable[Row]], Examples]:
    template = settings.prompt_template
    builders: dict[str, Callable[[Iterable[Row]], Examples]] = {
        "causal": lambda rows: (
            joined_examples(rows, tokenizer, length)
            if settings.join_rows
            else causal_examples(rows, tokenizer, length, packing=settings.packing is not False)
        ),
        "completion": lambda rows: completion_examples(rows, tokenizer, length, template=template),
        "chat": lambda rows: chat_examples(rows, tokenizer, length),
        "regression": lambda rows: regression_examples(rows, tokenizer, length),
        "qa": lambda rows: question_examples(
            rows, tokenizer, length, doc_stride=settings.doc_stride or min(128, length // 3)
        ),
        "summarization": lambda rows: summary_examples(
            rows, tokenizer, length, max_target_length=settings.max_target_length, template=template
        ),
    }
    return builders[settings.task]
