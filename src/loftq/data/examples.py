"""What a row becomes: token ids, and which of them a model is trained to predict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loftq.errors import SourceError

IGNORED = -100
"""The label of a token that is not predicted, as torch's cross entropy and transformers have it."""

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Example:
    """One input of a model.

    Attributes:
        input_ids: (n,) token ids.
        labels: (n,) the ids to predict, ``IGNORED`` elsewhere (causal tasks; transformers shifts them by one), or (m,) the
            target's ids (summarization), or a class, a value, or (start, end) of an answer.
        where: file and line of its row.
        extra: further inputs of the model, such as ``token_type_ids`` (n,).
        about: what a metric needs beside the model's output: gold answers, offsets, a reference text.
    """

    input_ids: Ids
    labels: Any
    where: str
    extra: dict[str, Ids] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


@dataclass
class Examples:
    """The examples of a split, and what happened to its rows on the way.

    Attributes:
        rows: how many were read. cut, first_cut: rows longer than ``max_length``, and where the first is.
        dropped, first_dropped: rows that had nothing left to predict once they were cut.
        empty, first_empty: rows without a text.
        untold, first_untold: turns of an assistant that the chat template does not tell from their prompts.
        incomplete: places of lines that lack fields, where a known file has such.
    """

    task: str
    max_length: int
    items: list[Example] = field(default_factory=list)
    rows: int = 0
    cut: int = 0
    first_cut: str = ""
    dropped: int = 0
    first_dropped: str = ""
    empty: int = 0
    first_empty: str = ""
    untold: int = 0
    first_untold: str = ""
    incomplete: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.items)

    def __getitem__(self, index: int) -> Example:
        return self.items[index]

    def add(self, found: Iterable[Example]) -> None:
        """Keep the examples of one row."""
        self.items.extend(found)
        self.rows += 1

    def was_cut(self, where: str) -> None:
        """Note that a row was longer than the model may see."""
        self.first_cut = self.first_cut or where
        self.cut += 1

    def was_dropped(self, where: str) -> None:
        """Note that a row gives no example."""
        self.first_dropped = self.first_dropped or where
        self.dropped += 1
        self.rows += 1

    def was_empty(self, where: str) -> None:
        """Note that a row has no text."""
        self.first_empty = self.first_empty or where
        self.empty += 1
        self.rows += 1

    def was_untold(self, where: str) -> None:
        """Note that a turn of the assistant is not learned."""
        self.first_untold = self.first_untold or where
        self.untold += 1

    def checked(self, name: str) -> Examples:
        """These examples, if there are any.

        Raises:
            SourceError: every row was empty, or longer than the model may see.
        """
        if not self.items and self.empty == self.rows:
            raise SourceError(
                f"all {self.rows} rows of {name} are empty (first: {self.first_empty}), expected texts; is it the right "
                f"column?"
            )
        if not self.items:
            raise SourceError(
                f"none of the {self.rows} rows of {name} leaves anything to predict within {self.max_length} tokens "
                f"(first: {self.first_dropped or self.first_cut}); raise --max-length or shorten the prompts"
            )
        return self

    def notes(self) -> list[str]:
        """One sentence for each thing that happened to rows."""
        found = []
        if self.incomplete:
            found.append(
                f"{len(self.incomplete):,} of {self.rows + len(self.incomplete):,} lines have fewer fields than the header, as "
                f"in GLUE's own file of QQP, and were left out, first {self.incomplete[0]}"
            )
        if self.empty:
            found.append(f"{self.empty:,} of {self.rows:,} rows are empty and were left out, first {self.first_empty}")
        if self.cut:
            found.append(
                f"{self.cut:,} of {self.rows:,} rows are longer than {self.max_length} tokens and were cut, first "
                f"{self.first_cut}"
            )
        if self.dropped:
            found.append(
                f"{self.dropped:,} of {self.rows:,} rows have nothing to predict within {self.max_length} tokens and were "
                f"left out, first {self.first_dropped}"
            )
        if self.untold:
            found.append(
                f"{self.untold:,} turns of the assistant cannot be told from their prompts in the chat template and are not "
                f"learned, first {self.first_untold}"
            )
        return found

    @property
    def tokens(self) -> int:
        """Tokens of all inputs."""
        return sum(len(example.input_ids) for example in self.items)

    @property
    def predicted(self) -> int:
        """Tokens that count in the loss; 0 for tasks whose labels are no tokens."""
        arrays = (e.labels for e in self.items if isinstance(e.labels, np.ndarray))
        shift = 0 if self.task == "summarization" else 1
        return sum(int((labels[shift:] != IGNORED).sum()) for labels in arrays)


def as_ids(values: Iterable[int]) -> Ids:
    """(n,) int32: half of what int64 takes, and vocabularies are far smaller than 2³¹."""
    return np.asarray(list(values), dtype=np.int32)
