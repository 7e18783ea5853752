"""From a row's columns to what a task needs of it, with one sentence for every row that does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loftq.data.rows import Row
from loftq.data.tasks import Task
from loftq.errors import ConfigError, SourceError

# optional roles that some rows of a file have and others lack, in JSON also as null; half a pair is a mistake
_MAY_LACK = ("input", "id")


@dataclass(frozen=True)
class Roles:
    """Which column plays which role.

    Attributes:
        task: whose roles they are. columns: role -> column.
        mapping: column -> role, as ``--map`` says. first: the row they were found in; ``None`` for no such row.
    """

    task: Task
    columns: Mapping[str, str]
    mapping: Mapping[str, str] = field(default_factory=dict)
    first: Row | None = None

    @classmethod
    def find(cls, task: Task, first: Row, mapping: Mapping[str, str]) -> Roles:
        """From ``--map`` (column -> role) and, for what it leaves open, the usual names of columns.

        Raises:
            ConfigError: a role that the task does not have, or is given twice. SourceError: the row lacks a column, other
                than one that rows may lack.
        """
        known = (*task.roles, *task.instead, *task.optional)
        chosen: dict[str, str] = {}
        for column, role in mapping.items():
            if role not in known:
                raise ConfigError(
                    f"column {column!r} is mapped to {role!r}, expected one of {', '.join(known)} for the task {task.name}"
                )
            if role in chosen:
                raise ConfigError(f"{role} is mapped to both {chosen[role]!r} and {column!r}; give one column")
            if column not in first.values and role not in _MAY_LACK:
                raise SourceError(f"{first.where} has no column {column!r}, it has {_columns(first)}; correct --map")
            chosen[role] = column
        pair = task.together
        if not set(pair) & set(chosen) and "prompt" not in first.values and not set(pair.values()) & set(mapping):
            chosen |= pair if set(pair.values()) <= set(first.values) else {}
        for role in known:
            taken = {*chosen.values(), *mapping}
            guesses = [c for c in task.candidates(role) if c in first.values and c not in taken]
            if role not in chosen and guesses:
                chosen[role] = guesses[0]
        missing = [role for role in task.roles if role not in chosen]
        if missing and task.instead and all(role in chosen for role in task.instead):
            missing = []
        elif task.instead and not missing:
            chosen = {role: column for role, column in chosen.items() if role in task.roles}
        if missing:
            raise SourceError(
                f"{first.where} has the columns {_columns(first)}, but none is known as {missing[0]} of the task "
                f"{task.name}; say which with --map COLUMN={missing[0]}"
            )
        return cls(task, chosen, mapping, first)

    def of(self, row: Row) -> Mapping[str, str]:
        """The columns of another row of the same data, which may have an ``input`` or an ``id`` or lack it.

        Raises:
            SourceError: it lacks another column, or has one more that would play a role.
        """
        for role, column in self.columns.items():
            if column not in row.values and role not in _MAY_LACK:
                raise SourceError(f"{row.where} has no column {column!r}, it has {_columns(row)}; repair or remove it")
        if self.first is None:
            return self.columns
        here = Roles.find(self.task, row, self.mapping).columns
        for role in (*self.task.roles, *self.task.instead, *self.task.optional):
            if role not in _MAY_LACK and here.get(role) != self.columns.get(role):
                raise SourceError(
                    f"{row.where} has {_named(here, role)} for {role}, but {self.first.where} has "
                    f"{_named(self.columns, role)}; give all rows the same columns, or say with --map which to take"
                )
        return here

    def apply(self, rows: Iterable[Row]) -> Iterable[Row]:
        """Rows whose values go by role, checked; an input that is not empty follows its prompt after a blank line.

        Raises:
            SourceError: a row lacks a column or holds something of another kind, or all lack one that ``--map`` names.
        """
        pair = "text_pair" in self.columns
        may_be_empty = ("text", "text_pair") if pair else self.task.may_be_empty
        found: dict[frozenset[str], Mapping[str, str]] = {}
        unseen = set(self.mapping)
        for row in rows:
            names = frozenset(row.values)
            if names not in found:
                found[names] = self.of(row)
                unseen -= names
            values: dict[str, Any] = {}
            for role, column in found[names].items():
                if role in _MAY_LACK and row.values.get(column) is None:
                    continue
                where = f"{row.where}: {column}"
                values[role] = _CHECKS[role](row.values[column], where)
                if _CHECKS[role] is _text and not values[role].strip() and role not in may_be_empty:
                    raise SourceError(f"{where} is empty, expected a text; fill it in or remove the row")
            if pair and not (values["text"] + values["text_pair"]).strip():
                raise SourceError(f"{row.where} has two empty texts, expected a text; fill one in or remove the row")
            extra = values.pop("input", "")
            if extra.strip():
                values["prompt"] += f"\n\n{extra}"
            yield Row(values, row.where)
        if unseen and self.first is not None:
            column = min(unseen)
            raise SourceError(
                f"none of the rows that were read, from {self.first.where} on, has the column {column!r}, which is mapped to "
                f"{self.mapping[column]}; correct --map"
            )


def _named(columns: Mapping[str, str], role: str) -> str:
    return f"the column {columns[role]!r}" if role in columns else "none"


def _columns(row: Row) -> str:
    return ", ".join(map(str, row.values)) or "none"


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise SourceError(f"{where} is {_shown(value)}, expected a text; repair or remove the row")
    return _encodable(value, where)


def _encodable(text: str, where: str) -> str:
    """JSON can spell half of a surrogate pair, which is no character and which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"{where} has half a character, {_shown(text[error.start])}, at {error.start}; repair or remove the row"
        ) from None
    return text


def _label(value: Any, where: str) -> str | int | float:
    if isinstance(value, bool):
        return str(value)  # the names that pandas writes into a CSV file
    if not isinstance(value, (str, int, float)) or (isinstance(value, str) and not value.strip()):
        raise SourceError(
            f"{where} is {_shown(value)}, expected a label (a name or a number); repair or remove the row"
        )
    return value


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise SourceError(f"{where} is {_shown(value)}, expected a list of messages; repair or remove the row")
    value = [_from_sharegpt(message) for message in value]
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise SourceError(
                f"{where} has the message {_shown(message)}, expected a role and a content, both texts; repair or remove "
                f"the row"
            )
        _encodable(message["content"], where)
    if not any(message["role"] == "assistant" for message in value):
        raise SourceError(f"{where} has no message of the assistant, and so nothing to learn; remove the row")
    return value


_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def _from_sharegpt(message: Any) -> Any:
    """A turn that says who speaks by ``from`` and what by ``value``; any other message as it is."""
    if not isinstance(message, dict) or "role" in message or str(message.get("from")) not in _SPEAKERS:
        return message
    return {"role": _SPEAKERS[message["from"]], "content": message.get("value")}


def _answers(value: Any, where: str) -> dict[str, list[Any]]:
    fits = (
        isinstance(value, dict)
        and isinstance(value.get("text"), list)
        and isinstance(value.get("answer_start"), list)
        and len(value["text"]) == len(value["answer_start"])
        and all(isinstance(t, str) and t.strip() for t in value["text"])
        and all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in value["answer_start"])
    )
    if fits and not value["text"]:
        raise SourceError(
            f"{where} has no answer, expected one inside the context as in SQuAD v1.1; remove questions without an answer"
        )
    if not fits:
        raise SourceError(
            f"{where} is {_shown(value)}, expected text and answer_start, two lists of equal length, as in SQuAD v1.1"
        )
    return value


def _identifier(value: Any, where: str) -> str:
    return str(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


_CHECKS = {
    "text": _text,
    "text_pair": _text,
    "prompt": _text,
    "input": _text,
    "completion": _text,
    "summary": _text,
    "context": _text,
    "question": _text,
    "messages": _messages,
    "label": _label,
    "answers": _answers,
    "id": _identifier,
}
