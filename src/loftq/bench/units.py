"""Measured amounts as a table shows them."""

from __future__ import annotations

from loftq.bench.case import BYTES, SECONDS
from loftq.report.tables import size


def amount(value: float, unit: str) -> str:
    """``19.8 µs``, ``5.27 ms``, ``1.23 s``, ``34.6 MB``, ``0.2835``."""
    if unit == BYTES:
        return size(value)
    if unit != SECONDS:
        return f"{value:.4f}"
    if value < 1:
        return f"{1e6 * value:.3g} µs" if value < 1e-3 else f"{1e3 * value:.3g} ms"
    return f"{value:.3g} s" if value < 100 else f"{value:.0f} s"
