"""A recipe's examples from files on this machine: which file is which split, and which column has which role.

The training file is called ``train``. The file of an evaluation is called after its split or after the evaluation
itself; for ``validation``, also ``dev``, ``valid`` or ``val``. Endings are those of :data:`ENDINGS`. A recipe may add names
and patterns of its own in ``data.local``. A file fits if its columns are called as on the hub, or as the roles, or as one
of the recipe's ``local_maps`` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loftq.data.formats import SUFFIXES, reader_for
from loftq.errors import ConfigError, SourceError
from loftq.recipes.recipe import Data, Recipe

ENDINGS = (*SUFFIXES, ".raw", ".tokens")
"""Of the files that are read, small or capital; WikiText's own text is in the last two."""
_TABLES = (".csv", ".tsv")
_ALIASES = ("validation", "dev", "valid", "val")  # GLUE calls its validation split dev
_OPTIONAL_ROLES = {"id"}


@dataclass(frozen=True)
class LocalSplit:
    """One split on this machine.

    Attributes:
        name: ``train``, or the evaluation's name.
        file: where it is.
        columns: what its columns are called; numbers from 0, as text, where it has no header.
        map: column -> role.
    """

    name: str
    file: Path
    columns: tuple[str, ...]
    map: Mapping[str, str]


def find_local(recipe: Recipe, folder: Path, chosen: Mapping[str, Path] | None = None) -> dict[str, LocalSplit]:
    """``train`` and the name of every evaluation -> its file, with columns checked.

    Args:
        recipe: whose splits to find.
        folder: where to look.
        chosen: file by the same names, for those that are called otherwise.

    Raises:
        SourceError: splits without a file, or a file whose columns do not fit; all of them in one sentence.
        ConfigError: ``chosen`` names what the recipe does not have.
    """
    if not folder.is_dir():
        raise SourceError(f"{folder} is no folder, expected one with {recipe.name}'s data; check --local")
    chosen = chosen or {}
    wanted = {"train": recipe.data.train, **recipe.data.evaluate}
    for name in chosen:
        if name not in wanted:
            raise ConfigError(
                f"--file names {name!r}, but {recipe.name} reads {', '.join(wanted)}; choose one of these"
            )
    problems = []
    found = {}
    for name, split in wanted.items():
        try:
            file = folder / chosen[name] if name in chosen else _find(recipe.data, folder, name, split)
            columns, headed = columns_of(file)
            found[name] = LocalSplit(name, file, columns, _fitting_map(recipe.data, file, columns, headed))
        except SourceError as error:
            problems.append(str(error))
    if problems:
        raise SourceError("; ".join(problems))
    return found


def _find(data: Data, folder: Path, name: str, split: str) -> Path:
    """The file of a split; the first name that exists counts."""
    stems = [name] if name == "train" else list(dict.fromkeys(s for n in (split, name) for s in _spellings(n)))
    here = sorted(f for f in folder.iterdir() if f.is_file())
    for stem in stems:
        files = [f for f in here if f.stem == stem and f.suffix.lower() in ENDINGS]
        if files:
            return _only(files, folder, name)
    for pattern in data.local.get(split, ()):
        files = sorted(f for f in folder.glob(pattern) if f.is_file())
        if files:
            return _only(files, folder, name)
    patterns = [f"{stem}.*" for stem in stems] + list(data.local.get(split, ()))
    raise SourceError(
        f"{folder} has no file for {name}, expected one called {', '.join(patterns)}; name another with --file {name}=FILE"
    )


def _spellings(split: str) -> list[str]:
    """``validation_matched`` -> the same, ``dev_matched``, ``valid_matched``, ``val_matched``."""
    if not split.startswith("validation"):
        return [split]
    return [alias + split.removeprefix("validation") for alias in _ALIASES]


def _only(files: list[Path], folder: Path, name: str) -> Path:
    if len(files) > 1:
        raise SourceError(
            f"{folder} has several files for {name} ({', '.join(f.name for f in files)}), expected one; name it with "
            f"--file {name}=FILE"
        )
    return files[0]


def _fitting_map(data: Data, file: Path, columns: tuple[str, ...], headed: bool) -> dict[str, str]:
    """Column -> role, of the first map that the columns fit."""
    by_role = {role: role for role in data.map.values()}
    for candidate in (data.map, by_role, *data.local_maps):
        numbered = all(column.isdecimal() for column in candidate)
        present = {str(i) for i in range(len(columns))} if numbered and not headed else set(columns)
        fits = {c: r for c, r in candidate.items() if c in present}
        if fits and {r for c, r in candidate.items() if c not in fits} <= _OPTIONAL_ROLES:
            return fits
    expected = " or ".join(", ".join(m) for m in (data.map, by_role, *data.local_maps))
    raise SourceError(f"{file} has the columns {', '.join(columns) or '(none)'}, expected {expected}; rename them")


def columns_of(file: Path) -> tuple[tuple[str, ...], bool]:
    """What a file's columns are called, and whether that is certain: a table's first line may be a header or an example.

    Raises:
        SourceError: if the file cannot be read, is empty, or of a kind that is not known.
    """
    suffix = file.suffix.lower()
    if suffix not in ENDINGS:
        raise SourceError(f"{file} ends in {file.suffix!r}, expected {', '.join(ENDINGS)}; convert it")
    is_table = suffix in _TABLES
    # a table as if it had no header: the first line's cells are its values
    first, _ = next(reader_for(file)(file, is_table, lambda where: None), ({}, ""))
    if not first:
        raise SourceError(f"{file} holds no example, expected at least one; is it the right file?")
    return tuple(map(str, first.values() if is_table else first)), not is_table
