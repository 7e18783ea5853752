"""Packages that only some of the work needs."""

from __future__ import annotations

import importlib
from typing import Any

from loftq.errors import ConfigError


def optional_module(module: str, needed_for: str, package: str, extra: str) -> Any:
    """Import a module of an optional package.

    Raises:
        ConfigError: where the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(
            f'{needed_for} needs {package}, which is not installed; pip install "loftq[{extra}]"'
        ) from None
