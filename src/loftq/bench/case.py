"""What a suite measures: some candidates for the same work, and every repeat of each."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SECONDS, BYTES, RELATIVE = "s", "bytes", "relative error"


@dataclass(frozen=True)
class Options:
    """What all suites have in common.

    Attributes:
        repeats: of every candidate, at least; quick ones are repeated more often.
        quick: small shapes, to see that everything runs; the numbers mean little.
        notice: told in one sentence what is left out, and why.
    """

    repeats: int = 7
    quick: bool = False
    notice: Callable[[str], None] = lambda sentence: None

    @property
    def seconds(self) -> float:
        """To spend on a case at least."""
        return 0.0 if self.quick else 1.0


@dataclass(frozen=True)
class Case:
    """Candidates measured side by side.

    Attributes:
        suite, name: which case it is; names are unique within a suite and the same for small shapes.
        values: candidate -> every repeat, in ``unit``.
        unit: ``s``, ``bytes`` or ``relative error``.
        tokens: that a run scores or generates; 0 where there are none.
    """

    suite: str
    name: str
    values: dict[str, tuple[float, ...]]
    unit: str = SECONDS
    tokens: int = 0

    def median(self, candidate: str) -> float:
        return statistics.median(self.values[candidate])

    def spread(self, candidate: str) -> float | None:
        """Half the range between the quartiles, relative to the median; ``None`` for a single value."""
        values, middle = self.values[candidate], self.median(candidate)
        if len(values) < 2 or middle == 0:
            return None
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return (high - low) / 2 / middle

    def ratio(self, candidate: str, against: str) -> float | None:
        """Median over median; ``None`` where ``against`` was not measured."""
        return self.median(candidate) / self.median(against) if against in self.values else None

    def to_dict(self) -> dict[str, Any]:
        candidates = {
            name: {"median": self.median(name), "spread": self.spread(name), "repeats": list(values)}
            for name, values in self.values.items()
        }
        named: dict[str, Any] = {"suite": self.suite, "case": self.name, "unit": self.unit}
        return named | ({"tokens": self.tokens} if self.tokens else {}) | {"candidates": candidates}
