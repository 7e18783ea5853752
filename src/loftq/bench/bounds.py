"""What the medians are held to, as data: two threads, full shapes, at least seven repeats.

A bound that is missed is a finding about a machine or a change, no error.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from loftq.bench.case import Case
from loftq.bench.units import amount

REPEATS = 7
THREADS = 2
DENSE, RIVAL, RIVAL_EVAL = "dense", "bitsandbytes", "bitsandbytes eval"
EXACT = "exact SVD"


@dataclass(frozen=True)
class Bound:
    """A candidate's median, or its ratio to another candidate's, has a limit.

    Attributes:
        suite, case, candidate: whose median.
        at_most: what the median, or its ratio to ``against``'s, may be at most.
        times_faster: how many times as long ``against`` takes at least; instead of ``at_most``.
        against: another candidate of the same case.
    """

    suite: str
    case: str
    candidate: str
    at_most: float | None = None
    against: str | None = None
    times_faster: float | None = None

    def value(self, case: Case) -> float | None:
        """What has the limit; ``None`` where the other candidate was not measured."""
        if self.against is None:
            return case.median(self.candidate)
        ratio = case.ratio(self.candidate, self.against)
        return ratio if ratio is None or self.times_faster is None else 1 / ratio

    def met(self, value: float) -> bool:
        return value >= self.times_faster if self.times_faster is not None else value <= (self.at_most or 0.0)

    def text(self, unit: str) -> str:
        """``at most 1.2 × dense``."""
        if self.times_faster is not None:
            return f"at least {self.times_faster:g} × faster than {self.against}"
        assert self.at_most is not None
        if self.against is not None:
            return f"at most {self.at_most:g} × {self.against}"
        return f"at most {amount(self.at_most, unit)}"


def linear_case(dtype: str, tokens: int, what: str) -> str:
    return f"{dtype}, {tokens} token{'' if tokens == 1 else 's'}, {what}"


INFERENCE, TRAINING = "inference", "forward + backward"
_NARROW = ("2 bits", "3 bits", "4 bits")


def _dequantize() -> Iterable[Bound]:
    for bits in _NARROW:
        yield Bound("dequantize", "to float32", bits, at_most=7e-3)
        yield Bound("dequantize", "to float32", bits, against=RIVAL, times_faster=5)


def _linear() -> Iterable[Bound]:
    for bits in _NARROW:
        for tokens in (64, 512):
            yield Bound("linear", linear_case("float32", tokens, TRAINING), bits, at_most=1.2, against=DENSE)
        yield Bound("linear", linear_case("float32", 64, TRAINING), bits, against=RIVAL, times_faster=1.35)
        yield Bound("linear", linear_case("bfloat16", 64, TRAINING), bits, at_most=1.6, against=DENSE)
        yield Bound("linear", linear_case("bfloat16", 64, TRAINING), bits, against=RIVAL, times_faster=2.5)
        for dtype in ("float32", "bfloat16"):
            yield Bound("linear", linear_case(dtype, 1, TRAINING), bits, against=RIVAL, times_faster=10)
    yield Bound("linear", linear_case("float32", 1, INFERENCE), "2 bits", against=DENSE, times_faster=4)
    for dtype in ("float32", "bfloat16"):
        case = linear_case(dtype, 1, INFERENCE)
        yield Bound("linear", case, "2 bits", at_most=1.0, against=RIVAL_EVAL)
        yield Bound("linear", case, "4 bits", at_most=1.3, against=RIVAL_EVAL)


def _solver() -> Iterable[Bound]:
    for bits in (2, 4):
        yield Bound("solver", f"decompose, {bits} bits", "default", at_most=4.0)
        yield Bound("solver", f"half the width, {bits} bits", "default", against=EXACT, times_faster=60)
        yield Bound("solver", f"half the width, {bits} bits, error", "default", at_most=1.003, against=EXACT)


def _model() -> Iterable[Bound]:
    yield Bound("model", "perplexity", "2 bits", at_most=1.25, against=DENSE)
    yield Bound("model", "greedy decoding", "2 bits", against=DENSE, times_faster=1)
    yield Bound("model", "quantize", "2 bits", at_most=20.0)
    yield Bound("model", "quantize, memory above Python and torch", "2 bits", at_most=1e9)


def _large() -> Iterable[Bound]:
    """Llama-2-7B's shape, measured by ``benchmarks/large.py``."""
    for bits in (2, 4):
        yield Bound("large", f"{bits} bits, 32 layers", "quantize", at_most=1800.0)
        yield Bound("large", f"{bits} bits, peak memory", "quantize", at_most=2.5e9)


BOUNDS: tuple[Bound, ...] = (*_dequantize(), *_linear(), *_solver(), *_model(), *_large())


@dataclass(frozen=True)
class Judged:
    """A bound and what was measured; ``value`` and ``met`` are ``None`` where the other candidate was not measured."""

    bound: Bound
    unit: str
    value: float | None
    met: bool | None

    @property
    def text(self) -> str:
        """``at most 1.2 × dense: met (1.13)``."""
        limit = self.bound.text(self.unit)
        if self.value is None:
            return f"{limit}: not measured"
        shown = amount(self.value, self.unit) if self.bound.against is None else f"{self.value:.3g}"
        return f"{limit}: {'met' if self.met else 'missed'} ({shown})"

    def to_dict(self) -> dict[str, Any]:
        bound = self.bound
        named = {"suite": bound.suite, "case": bound.case, "candidate": bound.candidate}
        return {**named, "bound": bound.text(self.unit), "value": self.value, "met": self.met}


def judge(case: Case) -> list[Judged]:
    """The bounds of a case, in order."""
    found = []
    for bound in BOUNDS:
        if (bound.suite, bound.case) == (case.suite, case.name) and bound.candidate in case.values:
            value = bound.value(case)
            found.append(Judged(bound, case.unit, value, None if value is None else bound.met(value)))
    return found
