"""Data sets of the hub, through the package datasets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from loftq.data.formats import SUFFIXES
from loftq.errors import ConfigError, SourceError, first_line

_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


def could_be_hub_name(name: str) -> bool:
    """Whether this could be the name of a data set of the hub, rather than of a file that does not exist."""
    return _NAME.fullmatch(name) is not None and PurePath(name).suffix.lower() not in SUFFIXES


def hub_rows(name: str, split: str, config: str | None = None, *, what: str, install: str) -> Iterator[dict[str, Any]]:
    """The rows of a split, streamed.

    Args:
        name, config: the data set's id and its configuration. split: or several, joined by ``+``, one after the other.
        what: what a user has called it, for the message where the package is missing. install: what pip has to install.

    Raises:
        ConfigError: the package is not installed. SourceError: there is no such data set, or it cannot be read.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise ConfigError(
            f"{what} is no file here, and data sets of the hub need another package; give a file, or pip install {install}"
        ) from None
    try:
        for part in split.split("+"):  # older versions of the package do not stream a sum
            yield from load_dataset(*filter(None, (name, config)), split=part.strip(), streaming=True)
    except Exception as error:
        whole = f"{name}:{config}" if config else name
        raise SourceError(
            f"data set {whole} could not be read ({first_line(error)}); check its name, its split {split!r} and the network"
        ) from None
