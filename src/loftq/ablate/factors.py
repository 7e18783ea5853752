"""What an ablation varies, which combinations mean the same, and which are measured."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from loftq.config import (
    BITS,
    CODEBOOKS,
    METHODS,
    LoftQConfig,
    check_damping,
    default_method,
    is_number,
    one_of,
    positive_int,
)
from loftq.errors import ConfigError
from loftq.solver.methods import METHODS as SETTINGS
from loftq.solver.methods import Method

_DEFAULT = LoftQConfig(calibration=None)
PLAIN = "qlora"
"""The name of plain quantization, whichever method it was asked for by."""
TWINNED = ("bits", "rank", "codebook")
"""Factors whose values are measured at T = 0 as well, where the sweep has T = 0."""


@dataclass(frozen=True)
class Factors:
    """One combination.

    Attributes:
        method: ``None`` for that of :func:`loftq.config.default_method`.
        bits: width of the codes; between 2, 3, 4 and 8 their average, by the first-layers rule.
        rank: of the adapters; 0 where plain quantization stands for all ranks.
        iters: alternations T. codebook: see :class:`loftq.QuantSpec`.
        damping: λ, ``None`` for the method's own. calibration: the text, ``None`` for weights only.
    """

    method: str | None = _DEFAULT.method
    bits: float = _DEFAULT.bits
    rank: int = _DEFAULT.rank
    iters: int = _DEFAULT.num_iter
    codebook: str = _DEFAULT.codebook
    damping: float | None = _DEFAULT.damping
    calibration: str | None = _DEFAULT.calibration

    def resolved(self, training: bool) -> Factors:
        """The combination without what makes no difference: two that are quantized alike are equal.

        T is at most the method's own number of steps. At T = 0 without error feedback every method is plain quantization,
        and its rank counts only in training, because B starts at 0. A damping or a text that is not used is ``None``.

        Raises:
            ConfigError: the method works on a text, and there is none.
        """
        name = self.method or default_method(self.bits, self.calibration is not None)
        method = SETTINGS[name]
        if method.needs_inputs and self.calibration is None:
            raise ConfigError(
                f"method {name} works on the layers' inputs, but the sweep asks for it without a calibration text; leave it "
                f"or the value none of --calibration out, or name the text first, so that it belongs to the base"
            )
        iters = self.iters if method.steps is None else min(self.iters, method.steps)
        if not iters and not method.feedback and not method.candidates:
            return replace(
                self, method=PLAIN, iters=0, rank=self.rank if training else 0, damping=None, calibration=None
            )
        if not method.needs_inputs or method.metric == "fisher":  # the latter knows no damping
            damping = None
        else:
            damping = method.damping if self.damping is None else float(self.damping)
        return replace(
            self,
            method=_first_alike(method, iters),
            iters=iters,
            rank=self.rank if training or iters or method.candidates else 0,
            damping=damping,
            calibration=self.calibration if method.needs_inputs else None,
        )


FACTORS = tuple(f.name for f in dataclasses.fields(Factors))


def _first_alike(method: Method, iters: int) -> str:
    """The first name of a method that does the same in ``iters`` steps: ``loftq-svd-first`` for ``pissa`` in one."""
    return next(
        name
        for name, other in SETTINGS.items()
        if (other.steps is None or other.steps >= iters) and _behaviour(other, iters) == _behaviour(method, iters)
    )


def _behaviour(method: Method, iters: int) -> Method:
    same = replace(method, source="", difference="", steps=None, damping=0.0)
    if iters or method.candidates:
        return same
    return replace(same, svd_first=False, principal_start=False, preserve=False, half_adapter=False)


@dataclass(frozen=True)
class Sweep:
    """The values of every factor, and how they are combined.

    Args:
        method, bits, rank, iters, codebook, damping, calibration: values, see :class:`Factors`.
        grid: all combinations. Otherwise one factor at a time departs from the base, and where 0 is among ``iters`` the
            values of bits, rank and codebook are measured at T = 0, as QLoRA, too.
        base: factor -> value of the base. Without: the first text, and of the others the default of ``loftq quantize``
            where it is among the values, elsewhere the largest T and the first of the rest. Where a picture of a grid
            would have too many lines, those nearest to the base are kept.

    Raises:
        ConfigError: for a value out of range, given twice or not among the values, or a factor that makes no difference.
    """

    method: tuple[str | None, ...] = (_DEFAULT.method,)
    bits: tuple[float, ...] = (_DEFAULT.bits,)
    rank: tuple[int, ...] = (_DEFAULT.rank,)
    iters: tuple[int, ...] = (_DEFAULT.num_iter,)
    codebook: tuple[str, ...] = (_DEFAULT.codebook,)
    damping: tuple[float | None, ...] = (_DEFAULT.damping,)
    calibration: tuple[str | None, ...] = (_DEFAULT.calibration,)
    grid: bool = False
    base: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in FACTORS:
            values = tuple(getattr(self, name))
            if not values:
                raise ConfigError(f"{name} is empty, expected at least one value")
            if len(set(values)) != len(values):
                raise ConfigError(f"{name} is {_listed(values)}, expected different values")
            object.__setattr__(self, name, values)
        for method in self.method:
            if method is not None:
                one_of("method", method, METHODS)
        for bits in self.bits:
            if not is_number(bits) or not BITS[0] <= bits <= BITS[-1]:
                raise ConfigError(f"bits is {bits!r}, expected a number from {BITS[0]} to {BITS[-1]}")
        for rank in self.rank:
            positive_int("rank", rank)
        for iters in self.iters:
            positive_int("iters", iters, 0)
        for codebook in self.codebook:
            one_of("codebook", codebook, CODEBOOKS)
        for damping in self.damping:
            check_damping(damping)
        for calibration in self.calibration:
            if calibration is not None and (not isinstance(calibration, str) or not calibration):
                raise ConfigError(f"calibration is {calibration!r}, expected a text's name or None")
        for name, value in self.base.items():
            one_of("factor of the base", name, FACTORS)
            if value not in getattr(self, name):
                raise ConfigError(
                    f"the base has {name} {value!r}, expected one of the values {_listed(getattr(self, name))}"
                )

    @property
    def base_cell(self) -> Factors:
        """The combination that the others depart from."""
        chosen = {}
        for name in FACTORS:
            values = getattr(self, name)
            usual = getattr(_DEFAULT, "num_iter" if name == "iters" else name)
            if name == "calibration" or usual not in values:  # T = 0 would make most other factors idle
                usual = max(values) if name == "iters" else values[0]
            chosen[name] = self.base.get(name, usual)
        return Factors(**chosen)

    def asked(self) -> list[Factors]:
        """The combinations as they were asked for, the base first unless it is a grid."""
        if self.grid:
            return [Factors(*values) for values in itertools.product(*(getattr(self, n) for n in FACTORS))]
        base = self.base_cell
        found = [base]
        for name in FACTORS:
            for value in getattr(self, name):
                cell = replace(base, **{name: value})
                found.append(cell)
                if name in TWINNED and 0 in self.iters:
                    found.append(replace(cell, iters=0))
        return list(dict.fromkeys(found))

    def cells(self, training: bool) -> dict[Factors, Factors]:
        """Asked for -> what is measured for it.

        Raises:
            ConfigError: a combination is impossible, or the values of a factor all mean the same.
        """
        found = {asked: asked.resolved(training) for asked in self.asked()}
        for name in FACTORS:
            values = getattr(self, name)
            if len(values) > 1 and len({getattr(cell, name) for cell in found.values()}) == 1:
                raise ConfigError(
                    f"{name} has the values {_listed(values)}, which make no difference to any cell of this sweep; give "
                    f"one of them{_HINTS.get(name, '')}"
                )
        return found


_HINTS = {
    "calibration": ", or a method that reads the text: --method default is loftq-data with a text, from 3 bits on "
    "loftq-data-zero, and loftq without",
    "damping": ", or a calibration text and a method that reads it",
    "iters": ", or a method with more than one step such as loftq",
}


def _listed(values: tuple[Any, ...]) -> str:
    return ", ".join("none" if value is None else f"{value}" for value in values)
