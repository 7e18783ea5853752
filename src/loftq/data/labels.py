"""Examples for classification and regression: one text or a pair, and a class or a value."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from loftq.data.examples import Example, Examples, as_ids
from loftq.data.rows import Row
from loftq.errors import SourceError


def label_names(rows: Iterable[Row]) -> list[str]:
    """The classes of a training split in the order of their numbers: numbers by size, names by alphabet.

    Raises:
        SourceError: numbers and names together, a single class, or GLUE's -1 for labels that are kept secret: on all rows,
            or beside classes that are numbered from 0 and more than two.
    """
    first: dict[str, str] = {}
    kinds: dict[bool, tuple[str, str]] = {}
    where = ""
    for row in rows:
        name = class_name(row.values["label"], row.where)
        where = where or row.where
        first.setdefault(name, row.where)
        kinds.setdefault(_is_integer(name), (name, row.where))
    if len(kinds) == 2:
        (name, place), (other, other_place) = kinds[False], kinds[True]
        raise SourceError(
            f"the label {name!r} ({place}) is a name, but {other!r} ({other_place}) a number; expected one kind, correct the "
            f"label column"
        )
    counted = first.keys() - {HIDDEN}
    if HIDDEN in first and (not counted or (len(counted) > 2 and counted == set(map(str, range(len(counted)))))):
        raise _hidden(first[HIDDEN])
    if len(first) < 2:
        raise SourceError(
            f"all rows from {where} on have the label {next(iter(first), '')!r}, expected at least two classes; is it the "
            f"right column?"
        )
    return sorted(first, key=int) if True in kinds else sorted(first)


def class_name(value: Any, where: str) -> str:
    """A label as the name of a class: the numbers 1 and 1.0 and the text ``1`` are the same class.

    The text ``1.0``, of a CSV file, is a name as it stands, for so may the version of a program be.

    Raises:
        SourceError: a number that is no integer.
    """
    if isinstance(value, float):
        if not value.is_integer():
            raise SourceError(f"{where} has the label {value}, expected a class; for values use the task regression")
        value = int(value)
    return str(value).strip()


HIDDEN = "-1"
"""What stands for no label in GLUE's test splits and on SNLI's rows that nobody agreed on, where it is no class."""


def _hidden(where: str) -> SourceError:
    return SourceError(
        f"{where} has the label -1, which stands for a hidden one; use a split with labels or remove the row, or name the "
        f"classes with --labels"
    )


def _is_integer(name: str) -> bool:
    return re.fullmatch(r"-?[0-9]{1,18}", name) is not None  # more digits are an identifier


_ANLI = {"e": "entailment", "n": "neutral", "c": "contradiction"}


def classification_examples(
    rows: Iterable[Row],
    tokenizer: Any,
    max_length: int,
    names: Sequence[str],
    *,
    where_names: str = "the training data",
) -> Examples:
    """Texts cut at ``max_length`` tokens, the longer of a pair first; the label is the index of its class in ``names``.

    A row may say the class by its name or, as data sets of the hub do and where no name is a number, by its number; the
    three classes of inference also by the first letter, as ANLI's own files do.

    Raises:
        SourceError: a class that is not in ``names``.
    """
    found = Examples("classification", max_length)
    for row, number in class_numbers(rows, names, where_names):
        found.add([_example(row, tokenizer, found, number)])
    return found


def class_numbers(rows: Iterable[Row], names: Sequence[str], where_names: str) -> Iterator[tuple[Row, int]]:
    """Rows with the index of their class in ``names``.

    Raises:
        SourceError: a class that is not in ``names``.
    """
    numbers = {name: i for i, name in enumerate(names)}
    if not any(_is_integer(name) for name in names):  # where 1 is a class, 0 is no other name of it
        numbers |= {str(i): i for i in range(len(names))}
    if set(names) == set(_ANLI.values()):
        numbers |= {letter: numbers[name] for letter, name in _ANLI.items()}
    for row in rows:
        name = class_name(row.values["label"], row.where)
        if name == HIDDEN and name not in numbers:
            raise _hidden(row.where)
        if name not in numbers:
            raise SourceError(
                f"{row.where} has the label {name!r}, expected one of {where_names}: {', '.join(names[:20])}; correct or "
                f"remove it"
            )
        yield row, numbers[name]


def regression_examples(rows: Iterable[Row], tokenizer: Any, max_length: int) -> Examples:
    """Texts as for classification; the label is a number.

    Raises:
        SourceError: a label that is no finite number.
    """
    found = Examples("regression", max_length)
    for row in rows:
        try:
            value = float(row.values["label"])
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not math.isfinite(value):
            shown = repr(row.values["label"])
            raise SourceError(
                f"{row.where} has the label {shown if len(shown) <= 60 else shown[:57] + '…'}, expected a number that a float "
                f"can hold; repair or remove it"
            )
        found.add([_example(row, tokenizer, found, value)])
    return found


def _example(row: Row, tokenizer: Any, found: Examples, label: int | float) -> Example:
    texts = [row.values["text"], *([row.values["text_pair"]] if "text_pair" in row.values else [])]
    encoded = tokenizer(*texts, truncation=True, max_length=found.max_length, verbose=False)
    ids = encoded.input_ids
    if len(ids) == found.max_length and len(tokenizer(*texts, verbose=False).input_ids) > found.max_length:
        found.was_cut(row.where)
    extra = {"token_type_ids": as_ids(encoded.token_type_ids)} if "token_type_ids" in encoded else {}
    return Example(as_ids(ids), label, row.where, extra, {"input": " | ".join(texts)})
