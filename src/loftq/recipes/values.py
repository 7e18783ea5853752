"""Checks of single values of a recipe file; each message is one sentence with the file and the key."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from loftq.config import reject_unknown
from loftq.errors import ConfigError

T = TypeVar("T")

# YAML 1.2 reads 1e-4 as a number; PyYAML follows YAML 1.1, which wants 1.0e-4, and gives text.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def keys(where: str, values: Mapping[str, Any], known: Iterable[str], required: Iterable[str]) -> None:
    """Refuse a key that does not exist, and miss none that must."""
    reject_unknown(where, map(str, values), known)
    missing = [key for key in required if values.get(key) is None]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}; add it or extend a recipe that has it")


def optional(check: Callable[[str, str, Any], T], where: str, key: str, value: Any) -> T | None:
    """``None`` as it is, anything else checked."""
    return None if value is None else check(where, key, value)


def text(where: str, key: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where}: {key} is {value!r}, expected text")
    return value


def texts(where: str, key: str, value: Any, empty: bool = True) -> tuple[str, ...]:
    if not isinstance(value, list) or not (value or empty) or not all(isinstance(v, str) and v for v in value):
        raise ConfigError(f"{where}: {key} is {value!r}, expected a list of texts")
    return tuple(value)


def mapping(where: str, key: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {key} is {value!r}, expected a mapping such as {{key: value}}")
    return value


def text_mapping(where: str, key: str, value: Any, empty: bool = True) -> dict[str, str]:
    """Text -> text; a number as a key, such as a column's, counts as text. A ``null`` takes back what a base gave."""
    given = {str(k): v for k, v in mapping(where, key, value).items() if v is not None}
    if not (given or empty) or not all(isinstance(v, str) and v for v in given.values()):
        raise ConfigError(f"{where}: {key} is {value!r}, expected a mapping from text to text")
    return given


def choice(where: str, key: str, value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        close = difflib.get_close_matches(str(value), allowed, 1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(allowed)}"
        raise ConfigError(f"{where}: {key} is {value!r}; {hint}")
    return str(value)


def number(value: Any) -> float | None:
    """A finite number, also one with an exponent and no dot; ``None`` for anything else."""
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def positive(where: str, key: str, value: Any) -> float:
    found = number(value)
    if found is None or found <= 0:
        raise ConfigError(f"{where}: {key} is {value!r}, expected a positive number")
    return found


def share(where: str, key: str, value: Any) -> float:
    found = number(value)
    if found is None or not 0 <= found < 1:
        raise ConfigError(f"{where}: {key} is {value!r}, expected a number from 0 to below 1")
    return found


def count(where: str, key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{where}: {key} is {value!r}, expected an integer of at least 1")
    return value
