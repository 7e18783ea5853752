"""Files of rows: JSONL, JSON, CSV, TSV, Parquet and plain text, told apart by their suffix.

A JSON file is a list of objects, one of LMFlow's ``{"type": …, "instances": […]}``, or a SQuAD v1.1 file. Every reader
yields ``(values, where)``; ``where`` names the file and, for files of lines, the line.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loftq.errors import SourceError, first_line
from loftq.optional import optional_module

Found = tuple[dict[str, Any], str]
LeftOut = Callable[[str], None]
"""Told the place of a line that is left out."""
# GLUE's own train.tsv has lines of fewer fields, which everybody who reads it leaves out, the hub's copy too
_QQP = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
_LIMIT = 2**31 - 1  # of a CSV field; the csv module's own is 128 kB, less than an article

Reader = Callable[[Path, bool, LeftOut], Iterator[Found]]
"""Takes the file, whether a table has no header, so that its columns are called 0, 1, …, and whom to tell of lines left out."""


def reader_for(path: Path) -> Reader:
    """The reader of a file, by its suffix; a file of no known suffix is text."""
    return _READERS.get(path.suffix.lower(), read_text)


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{path}, line {_undecodable(path)} is not UTF-8 ({error.reason}); convert the file first"
        ) from None
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror or error}); check its permissions") from None


def _undecodable(path: Path) -> int:
    """The first line with bytes that are not UTF-8; the decoder has read far ahead of the lines it gave."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        return next(number for number, line in enumerate(file, 1) if any("\udc80" <= c <= "\udcff" for c in line))


def read_jsonl(path: Path, numbered: bool, left_out: LeftOut) -> Iterator[Found]:
    """One JSON object a line; empty lines do not count."""
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            values = json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            raise SourceError(
                f"{where} is no JSON ({error.msg} at column {error.colno}); repair or remove it"
            ) from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, or lists in lists in lists
            raise SourceError(
                f"{where} is no JSON that can be read ({first_line(error)}); repair or remove it"
            ) from None
        yield _object(values, where), where


def read_table(path: Path, numbered: bool, left_out: LeftOut) -> Iterator[Found]:
    """CSV with quoted fields; TSV as GLUE writes it, where a quotation mark is a character like any other.

    A row is named by its first line; a quoted field may go over several.
    """
    tabs = path.suffix.lower() == ".tsv"
    csv.field_size_limit(_LIMIT)
    reader = (
        csv.reader(_lines(path), delimiter="\t", quoting=csv.QUOTE_NONE)
        if tabs
        else csv.reader(_lines(path), strict=True)
    )
    header: list[str] | None = None
    begin = 1
    try:
        for fields in reader:
            where, begin = f"{path}, line {begin}", reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = [str(i) for i in range(len(fields))] if numbered else fields
                if not numbered:
                    _check_header(header, where)
                    continue
            if len(fields) < len(header) and tabs and header == _QQP:
                left_out(where)
                continue
            if len(fields) != len(header):
                raise SourceError(
                    f"{where} has {len(fields)} columns, expected {len(header)} as in the file's first line; repair or "
                    f"remove it"
                )
            yield dict(zip(header, fields, strict=True)), where
    except csv.Error as error:
        raise SourceError(f"{path}, line {begin} cannot be read ({error}); repair or remove it") from None


def _check_header(header: list[str], where: str) -> None:
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise SourceError(f"{where} has the column {twice!r} twice, expected different names; rename one")


def read_parquet(path: Path, numbered: bool, left_out: LeftOut) -> Iterator[Found]:
    """Parquet, a batch of rows at a time."""
    parquet = optional_module("pyarrow.parquet", str(path), "pyarrow", "train")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            _check_header(file.schema_arrow.names, str(path))
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    yield values, f"{path}, row {number}"
                    number += 1
    except SourceError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's errors are both
        raise SourceError(f"{path} is no readable Parquet file ({first_line(error)}); write it again") from None


def read_text(path: Path, numbered: bool, left_out: LeftOut) -> Iterator[Found]:
    """The whole file is one text."""
    text = "".join(_lines(path))
    if text.strip():
        yield {"text": text}, str(path)


def read_json(path: Path, numbered: bool, left_out: LeftOut) -> Iterator[Found]:
    """A list of objects, LMFlow's format, or SQuAD's."""
    text = "".join(_lines(path))
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; one object a line is a .jsonl file" if error.msg == "Extra data" else "; repair it"
        raise SourceError(f"{path}, line {error.lineno} is no JSON ({error.msg}){hint}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or lists in lists in lists
        raise SourceError(f"{path} is no JSON that can be read ({first_line(error)}); repair it") from None
    if isinstance(values, dict) and isinstance(values.get("instances"), list):
        kind = values.get("type")
        for instance, where in _items(path, text, values["instances"], "instances"):
            yield _from_lmflow(kind, instance, where), where
    elif isinstance(values, dict) and isinstance(values.get("data"), list):
        for entry, where in _items(path, text, values["data"], "data"):
            # a list of plain rows under "data" is common too
            yield from _from_squad(entry, where) if "paragraphs" in entry else [(entry, where)]
    elif isinstance(values, list):
        yield from _items(path, text, values, None)
    else:
        raise SourceError(
            f"{path} holds {_kind(values)}, expected a list of objects, LMFlow's type and instances, or SQuAD's data"
        )


def _items(path: Path, text: str, values: list[Any], key: str | None) -> Iterator[Found]:
    """The objects of a list, each with the line it begins in."""
    lines = _first_lines(text, values, key)
    for number, value in enumerate(values):
        where = f"{path}, line {lines[number]}" if lines else f"{path}, item {number}"
        yield _object(value, where), where


def _first_lines(text: str, values: list[Any], key: str | None) -> list[int] | None:
    """The line in which each item of a parsed list begins; ``None`` where the list is not found again in the text."""
    decoder, lines, line, counted = json.JSONDecoder(), [], 1, 0
    try:
        position = text.index("[", 0 if key is None else text.index(f'"{key}"')) + 1
        for value in values:
            while text[position] in " \t\r\n,":
                position += 1
            line, counted = line + text.count("\n", counted, position), position
            found, position = decoder.raw_decode(text, position)
            if found != value:
                return None
            lines.append(line)
    except (ValueError, IndexError):
        return None
    return lines


def _object(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise SourceError(f"{where} is {_kind(values)}, expected a JSON object; repair or remove it")
    return values


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with {', '.join(map(str, value)) or 'no keys'}"
    return {list: "a list", str: "a string", bool: "true or false", type(None): "null"}.get(type(value), "a number")


def _from_lmflow(kind: Any, values: dict[str, Any], where: str) -> dict[str, Any]:
    """LMFlow's three types as this project's roles: text, prompt and completion, messages."""
    try:
        if kind == "text_only":
            return {"text": values["text"]}
        if kind == "text2text":
            return {"prompt": values["input"], "completion": values["output"]}
        if kind == "conversation":
            system = values.get("system")
            head = [{"role": "system", "content": system}] if system else []
            return {"messages": [*head, *values["messages"]]}
    except (KeyError, TypeError) as error:
        raise SourceError(f"{where} {_problem(error)} LMFlow's type {kind!r}; repair or remove it") from None
    raise SourceError(f"{where} is of type {kind!r}, expected LMFlow's text_only, text2text or conversation")


def _from_squad(article: dict[str, Any], where: str) -> Iterator[Found]:
    try:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = question["answers"]
                yield (
                    {
                        "id": question["id"],
                        "context": paragraph["context"],
                        "question": question["question"],
                        "answers": {
                            "text": [a["text"] for a in answers],
                            "answer_start": [a["answer_start"] for a in answers],
                        },
                    },
                    f"{where}, question {question['id']}",
                )
    except (KeyError, TypeError) as error:
        raise SourceError(f"{where} {_problem(error)} SQuAD's format; repair or remove it") from None


def _problem(error: Exception) -> str:
    """A key that is missing, or a value of another kind than it should be."""
    return f"lacks {error} of" if isinstance(error, KeyError) else "does not follow"


_READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_table,
    ".tsv": read_table,
    ".parquet": read_parquet,
    ".txt": read_text,
}
SUFFIXES = tuple(_READERS)
