"""Named settings of the alternation, as data."""

from __future__ import annotations

from dataclasses import dataclass

from loftq.config import METHODS as NAMES
from loftq.config import one_of


@dataclass(frozen=True)
class Method:
    """One published way to choose Q and the adapter.

    Attributes:
        source: where it was published.
        alternate: fit the adapter to the residual, ``num_iter`` times; otherwise PEFT's default initialisation.
        svd_first: swap the two lines of Algorithm 1's loop.
        principal_start: start from L = SVD_r(W) instead of L = 0.
    """

    source: str
    alternate: bool = True
    svd_first: bool = False
    principal_start: bool = False


METHODS = {
    "loftq": Method("LoftQ, Algorithm 1 (arXiv 2310.08659)"),
    "loftq-principal": Method("LoftQ from PiSSA's start (arXiv 2404.02948)", principal_start=True),
    "loftq-svd-first": Method("LoftQ, Table 6 (arXiv 2310.08659)", svd_first=True),
    "qlora": Method("QLoRA (arXiv 2305.14314)", alternate=False),
}
assert tuple(METHODS) == NAMES


def method_named(name: str) -> Method:
    """The :class:`Method` of that name, or a ``ConfigError`` that lists the names."""
    return METHODS[one_of("method", name, METHODS)]
