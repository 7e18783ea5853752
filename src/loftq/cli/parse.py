"""Turning option values into what the API takes."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, overload

from loftq.config import PUBLISHED
from loftq.errors import ConfigError

TASK_HELP = "causal, completion, chat, classification, regression, qa, summarization."
DATA_HELP = (
    "File (JSONL, JSON, CSV, TSV, Parquet, text), folder with a file a split, or hub data set ID[:CONFIG]; for causal also "
    "FILE.safetensors:KEY with token ids."
)
MAP_HELP = "COLUMN=ROLE for columns with unusual names; numbers for a file without header."

_SIZE = re.compile(r"^(\d{1,15}(?:\.\d+)?)\s*([KMGT]?)B?$", re.IGNORECASE)
_NUMBER = re.compile(r"[0-9]{1,9}")


def module_patterns(values: list[str] | None) -> str | tuple[str, ...] | None:
    """``--target-modules q_proj,v_proj`` or repeated: a list of names. One value with regex signs: an expression."""
    if not values:
        return None
    if len(values) == 1 and (values[0] == "all-linear" or re.search(r"[\\^$*+?()\[\]{}|]", values[0])):
        return values[0]
    return tuple(name for value in values for name in re.split(r"[,\s]+", value) if name)


def column_map(values: list[str] | None) -> dict[str, str]:
    """``--map body=text,stars=label`` or repeated -> column to role."""
    found: dict[str, str] = {}
    for part in (p for value in values or () for p in value.split(",")):
        column, equals, role = part.rpartition("=")
        if not equals or not column.strip() or not role.strip():
            raise ConfigError(f"--map is {part!r}, expected COLUMN=ROLE such as sentence=text")
        found[column.strip()] = role.strip()
    return found


@overload
def names(option: str, value: str) -> tuple[str, ...]: ...


@overload
def names(option: str, value: str | None) -> tuple[str, ...] | None: ...


def names(option: str, value: str | None) -> tuple[str, ...] | None:
    """``accuracy,f1`` -> a tuple; ``None`` for an option that was not given."""
    if value is None:
        return None
    found = tuple(name.strip() for name in value.split(",") if name.strip())
    if not found:
        raise ConfigError(f"{option} is {value!r}, which names nothing; expected values with commas, or leave it out")
    return found


def seeds(value: str) -> tuple[int, ...]:
    """``--seeds 0,1,2``"""
    try:
        return tuple(int(part) for part in names("--seeds", value))
    except ValueError:
        raise ConfigError(f"--seeds is {value!r}, expected integers with commas such as 0,1,2") from None


def int_patterns(option: str, values: Iterable[str] | None) -> dict[str, int]:
    """``--bits-pattern down_proj=4`` -> ``{"down_proj": 4}``."""
    result = {}
    for value in values or ():
        pattern, equals, number = value.rpartition("=")
        if not equals or not pattern or not _NUMBER.fullmatch(number.strip()):
            raise ConfigError(f"{option} is {value!r}, expected PATTERN=NUMBER such as down_proj=4")
        result[pattern] = int(number)
    return result


def first_layers(value: str | None) -> tuple[int, int] | None:
    """``--first-layers-bits 16:4`` -> ``(16, 4)``."""
    if value is None:
        return None
    count, colon, bits = value.partition(":")
    if not colon or not _NUMBER.fullmatch(count) or not _NUMBER.fullmatch(bits):
        raise ConfigError(f"--first-layers-bits is {value!r}, expected LAYERS:BITS such as 16:4")
    return int(count), int(bits)


def byte_size(option: str, value: str) -> int:
    """``5GB`` -> 5000000000 (decimal units, as transformers reads them)."""
    match = _SIZE.match(value.strip())
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise ConfigError(f"{option} is {value!r}, expected a size such as 500MB or 5GB")
    return size


def this_command() -> str:
    """The command line as it was given, quoted for a shell."""
    return shlex.join(["loftq", *sys.argv[1:]])


def quantizer(published: bool, codebook: str | None, scale: str | None, scale_dtype: str | None) -> dict[str, Any]:
    """What ``--published`` or the options beside it set, as fields of :class:`LoftQConfig`."""
    given = {"codebook": codebook, "scale": scale, "scale_dtype": scale_dtype}
    chosen = {name: value for name, value in given.items() if value is not None}
    if published and chosen:
        raise ConfigError(
            f"--published already sets the quantizer, but --{next(iter(chosen)).replace('_', '-')} was given too; give one"
        )
    return PUBLISHED if published else chosen


def calibration_text(calibration: str | None, statistics: Path | None, no_calibration: bool) -> str | None:
    """The field ``calibration`` of :class:`LoftQConfig`."""
    if no_calibration and (calibration is not None or statistics is not None):
        raise ConfigError("--no-calibration was given together with a calibration; give one")
    if calibration is not None and statistics is not None:
        raise ConfigError("--calibration and --statistics were both given; give one")
    return None if no_calibration else calibration or "auto"
