"""Finding and reading recipe files; ``extends`` puts one file's values over another's."""

from __future__ import annotations

import difflib
import fnmatch
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loftq.errors import ConfigError, SourceError, first_line
from loftq.recipes.recipe import Recipe, parse_recipe
from loftq.recipes.values import number

FOLDER = Path(__file__).resolve().parent
_SUFFIX = ".yaml"
# What a recipe adds to its base's, key by key; every other value replaces the base's as a whole, so that no column of
# the base's map and no number of its table is left over.
_SECTIONS = ("data", "training", "quantization", "unstated")
_ADDED = "notes"
# What the paper found holds for its model and data set alone.
_FOUND = ("published", "published_size", "seeds", "notes")
_NAME = re.compile(r"([\w-]+/)?[\w.-]+")


def list_recipes(pattern: str | None = None) -> list[str]:
    """Names of the recipes that come with loftq, sorted; ``pattern`` as in a shell, such as ``glue/*-r16``.

    Raises:
        ConfigError: if no name matches.
    """
    files = FOLDER.glob(f"*/*{_SUFFIX}")
    names = sorted(f"{f.parent.name}/{f.stem}" for f in files if not f.stem.startswith("_"))
    if pattern is None:
        return names
    found = fnmatch.filter(names, pattern)
    if not found:
        raise ConfigError(f"no recipe is called {pattern!r}{_hint(pattern, names)}")
    return found


def load_recipe(name: str | Path, changes: Iterable[str] = ()) -> Recipe:
    """A recipe by its name, or from a file of one's own that ends in ``.yaml``.

    Args:
        name: such as ``glue/mnli-nf2-r16`` or ``my-recipe.yaml``.
        changes: ``KEY=VALUE`` with a dotted key, such as ``training.epochs=1``; VALUE is YAML.

    Raises:
        ConfigError: no such recipe, or a wrong key or value, in one sentence with the file and the key.
        SourceError: the file cannot be read.
    """
    if str(name).endswith(_SUFFIX):
        file = Path(os.path.expanduser(name))
        called = file.stem
    else:
        names = list_recipes()
        if name not in names:
            raise ConfigError(f"no recipe is called {str(name)!r}{_hint(str(name), names)}")
        file = FOLDER / f"{name}{_SUFFIX}"
        called = str(name)
    values = _extended(file, ())
    for change in changes:
        _set(values, change)
    return parse_recipe(called, values, _shown(file))


def _hint(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, 3)
    return f"; did you mean {' or '.join(close)}?" if close else "; `loftq reproduce --list` shows all names"


def _shown(file: Path) -> str:
    """The path as messages show it: short for what comes with loftq."""
    return file.relative_to(FOLDER).as_posix() if _is_ours(file) else str(file)


def _is_ours(file: Path) -> bool:
    """Whether the file comes with loftq."""
    return file.is_relative_to(FOLDER)


def _extended(file: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """What a file holds, over what it extends."""
    file = file.resolve()
    if file in above:
        chain = " extends ".join(_shown(f) for f in (*above[above.index(file) :], file))
        raise ConfigError(f"{chain}, a circle; remove one of them")
    values = _read(file)
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str) or not _NAME.fullmatch(base):
        raise ConfigError(f"{_shown(file)}: extends is {base!r}, expected the name of a file beside it or of a recipe")
    parent = (FOLDER if "/" in base else file.parent) / f"{base}{_SUFFIX}"
    if not parent.is_file():
        raise ConfigError(f"{_shown(file)}: extends is {base!r}, but there is no file {_shown(parent)}; check the name")
    inherited = _extended(parent, (*above, file))
    if not _is_ours(file) and _experiment(_merged(inherited, values)) != _experiment(inherited):
        inherited = {key: value for key, value in inherited.items() if key not in _FOUND}
    return _merged(inherited, values)


def _read(file: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{_shown(file)} cannot be read ({error}); expected a recipe in YAML") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{_shown(file)} is no YAML ({first_line(error)}); correct it there") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{_shown(file)} holds a {type(values).__name__}, expected the keys of a recipe")
    return values


def _experiment(values: Mapping[str, Any]) -> tuple[Any, Any]:
    """Model and data set."""
    data = values.get("data")
    return values.get("model"), (data.get("id"), data.get("config")) if isinstance(data, Mapping) else data


def _merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """``own`` over ``base``: the sections key by key, notes added up, anything else replaced."""
    result = dict(base)
    for key, value in own.items():
        before = base.get(key)
        if key in _SECTIONS and isinstance(before, Mapping) and isinstance(value, Mapping):
            result[key] = {**before, **value}
        elif key == _ADDED and isinstance(before, list) and isinstance(value, list):
            result[key] = [*before, *value]
        else:
            result[key] = value
    return result


def _set(values: dict[str, Any], change: str) -> None:
    import yaml

    key, equals, written = change.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"--set is {change!r}, expected KEY=VALUE such as training.epochs=1")
    try:
        value = yaml.safe_load(written)
    except yaml.YAMLError:
        raise ConfigError(f"--set {key} is {written!r}, expected YAML such as 1, true or [a, b]") from None
    exponent = number(value)
    for part in path[:-1]:
        inner = values.get(part)
        values[part] = dict(inner) if isinstance(inner, Mapping) else {}
        values = values[part]
    values[path[-1]] = value if exponent is None else exponent
