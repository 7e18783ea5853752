"""Calibration: what the inputs of every layer are on a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loftq.calibrate.collect import collect_from_model
    from loftq.calibrate.forward import StreamedForward
    from loftq.calibrate.groups import Group
    from loftq.calibrate.statistics import Statistics
    from loftq.calibrate.text import CalibrationTokens, calibration_tokens

_HOME = {
    "collect_from_model": "collect",
    "Group": "groups",
    "StreamedForward": "forward",
    "Statistics": "statistics",
    "CalibrationTokens": "text",
    "calibration_tokens": "text",
}

__all__ = [
    "CalibrationTokens",
    "Group",
    "Statistics",
    "StreamedForward",
    "calibration_tokens",
    "collect_from_model",
]


def __getattr__(name: str) -> Any:
    """The package's names, loaded when first used."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
