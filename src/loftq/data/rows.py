"""Rows of a data set, each with the place it comes from, so that whatever is wrong with one can be found.

A data set is a file, several by a name with ``*``, a folder with one file a split (``train.jsonl``, ``validation.tsv``) or
its shards (``train-00000-of-00002.parquet``), or a data set of the hub as ``ID`` or ``ID:CONFIG``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from loftq.data.formats import SUFFIXES, LeftOut, reader_for
from loftq.data.hub import could_be_hub_name, hub_rows
from loftq.errors import SourceError

# as `train-00000-of-00002.parquet`: one file of a split
_SHARD = re.compile(r"(.+)-\d+-of-(\d+)(\.\w+)")
# names under which people keep the same split
_SPLITS = {
    "validation": ("validation", "dev", "val", "valid"),
    "train": ("train", "training"),
    "test": ("test",),
}


@dataclass(frozen=True)
class Row:
    """One row: column -> value, and where it is, such as ``train.jsonl, line 7``."""

    values: dict[str, Any]
    where: str


def read_rows(
    name: str | Path,
    *,
    split: str = "train",
    numbered: bool = False,
    limit: int | None = None,
    left_out: LeftOut = lambda where: None,
) -> Iterator[Row]:
    """The rows of a data set, one at a time.

    Args:
        name: file, or several by a name with ``*``, folder, or hub data set.
        split: of a folder or a hub data set; a file is one split.
        numbered: columns of a CSV or TSV file are called ``0``, ``1``, … because it has no header.
        limit: stop after so many rows.
        left_out: told the place of each line of GLUE's QQP file that lacks fields and is left out.

    Raises:
        SourceError: no such data set, an unreadable one, or one without rows; the message names file and line.
    """
    path = Path(os.path.expanduser(name))
    try:
        files = _files_of(path, split) if path.is_dir() else [path] if path.is_file() else _matching(path)
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror or error}); check its permissions") from None
    found: Iterator[Row]
    if files:
        found = (Row(*row) for file in files for row in reader_for(file)(file, numbered, left_out))
    elif could_be_hub_name(str(name)):
        found = _hub_rows(str(name), split)
    else:
        raise SourceError(f"data {str(name)!r} does not exist, expected a file, a folder of splits or a hub data set")
    count = 0
    for row in islice(found, limit):
        count += 1
        yield row
    if count == 0:
        raise SourceError(f"{', '.join(map(str, files)) or name} has no rows, expected at least one")


def _matching(pattern: Path) -> list[Path]:
    """The files that a name with ``*`` stands for, by name."""
    return sorted(f for f in pattern.parent.glob(pattern.name) if f.is_file()) if "*" in pattern.name else []


def _files_of(folder: Path, split: str) -> list[Path]:
    """The file of a split, or all its shards."""
    names = _SPLITS.get(split, (split,))
    readable = [f for f in sorted(folder.iterdir()) if f.suffix.lower() in SUFFIXES]
    found = [f for f in readable if (m[1] if (m := _SHARD.fullmatch(f.name)) else f.stem) in names]
    if not found:
        # `valid.unk.txt`, `test1000.jsonl`: more than the split's name, but nothing else begins with it
        found = [f for f in readable if f.name.startswith(names)]
    if not found:
        here = ", ".join(f.name for f in sorted(folder.iterdir()) if f.is_file()) or "no files"
        raise SourceError(
            f"{folder} has no file for the split {split!r}, expected {split}.jsonl or the like; it has {here}"
        )
    shards = [_SHARD.fullmatch(f.name) for f in found]
    if all(shards) and len({(m[1], m[3]) for m in shards if m}) == 1:
        missing = int(shards[0][2]) - len(found) if shards[0] else 0
        if missing:
            raise SourceError(f"{folder} lacks {missing} of the files of which {found[0].name} is one; complete them")
        return found
    if len(found) > 1:
        raise SourceError(
            f"{folder} has {found[0].name} and {found[1].name} for the split {split!r}, expected one; name the file itself"
        )
    return found


def _hub_rows(name: str, split: str) -> Iterator[Row]:
    identifier, _, config = name.partition(":")
    rows = hub_rows(identifier, split, config, what=f"data {name!r}", install='"loftq[train]"')
    for number, values in enumerate(rows):
        yield Row(dict(values), f"{name} {split}, row {number}")
