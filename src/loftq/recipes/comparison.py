"""Measured beside published."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loftq.errors import ConfigError
from loftq.recipes.recipe import REFERENCES, Recipe

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Measurement:
    """What one evaluation of one seed gave.

    Attributes:
        method, seed, evaluation: of which step.
        metrics: name -> value in the published unit, percent but for perplexity; ``None`` where it is undefined.
        examples: how many were evaluated.
        rouge: what ROUGE was taken with, see :func:`loftq.evaluate.rouge.conditions`; ``None`` where it was not taken.
    """

    method: str
    seed: int
    evaluation: str
    metrics: Mapping[str, float | None]
    examples: int
    rouge: Mapping[str, Any] | None = None

    @classmethod
    def from_result(cls, method: str, seed: int, evaluation: str, result: Mapping[str, Any]) -> Measurement:
        """From what an evaluation returns: metrics, ``examples`` and ``rouge`` in one mapping."""
        metrics = {k: v for k, v in result.items() if k != "examples" and (v is None or isinstance(v, (int, float)))}
        return cls(method, seed, evaluation, metrics, int(result["examples"]), result.get("rouge"))


@dataclass(frozen=True)
class Compared:
    """One line of the table.

    Attributes:
        method, metric: which number; the metric as in :attr:`loftq.recipes.recipe.Recipe.published`.
        published: as printed. printed: whether the paper has the cell at all; with ``published`` ``None``, it says N.A.
        measured: median over the seeds in the published unit, ``None`` if not run. lowest, highest: over the seeds.
        runs: number of seeds.
        remark: why there is no measured number.
    """

    method: str
    metric: str
    published: float | None
    printed: bool
    measured: float | None
    lowest: float | None
    highest: float | None
    runs: int
    remark: str = ""


def compare(recipe: Recipe, measured: Iterable[Measurement]) -> list[Compared]:
    """Every published number with the median of what was measured; then what was measured and never published.

    A metric without an evaluation's name is over all evaluations together: the mean weighted by their examples.
    """
    measured = list(measured)
    methods = list(dict.fromkeys([*recipe.published, *(m.method for m in measured)]))
    lines = []
    for method in methods:
        published = recipe.published.get(method, {})
        for metric in published or _metrics(recipe):
            values = _values(recipe, metric, [m for m in measured if m.method == method])
            lines.append(
                Compared(
                    method=method,
                    metric=metric,
                    published=published.get(metric),
                    printed=metric in published,
                    measured=statistics.median(values) if values else None,
                    lowest=min(values, default=None),
                    highest=max(values, default=None),
                    runs=len(values),
                    remark=REFERENCES.get(method, ""),
                )
            )
    return lines


def comparison_table(recipe: Recipe, measured: Iterable[Measurement]) -> Table:
    """:func:`compare` as a table for a terminal."""
    from loftq.report.tables import table

    columns = dict.fromkeys(("method", "metric"), "left")
    columns |= dict.fromkeys(("published", "measured", "difference", "seeds"), "right") | {"": "left"}
    return table(columns, [_cells(line) for line in compare(recipe, measured)])


def _metrics(recipe: Recipe) -> list[str]:
    """Names under which a method without published numbers is shown: those of the recipe's other methods, if it has any."""
    named = dict.fromkeys(metric for numbers in recipe.published.values() for metric in numbers)
    return list(named or recipe.metrics)


def _values(recipe: Recipe, metric: str, measured: Sequence[Measurement]) -> list[float]:
    """One number a seed; seeds with an evaluation that is missing or undefined are left out."""
    evaluation, _, name = metric.rpartition("/")
    wanted = [evaluation] if evaluation else list(recipe.data.evaluate)
    values = []
    for seed in dict.fromkeys(m.seed for m in measured):
        found = [m for m in measured if m.seed == seed and m.evaluation in wanted]
        if len(found) < len(wanted):
            continue
        missing = next((m for m in found if name not in m.metrics), None)
        if missing is not None:
            raise ConfigError(
                f"the evaluation {missing.evaluation} gave {', '.join(missing.metrics) or 'nothing'}, expected {name}; "
                f"check the recipe's metrics"
            )
        known = [(value, m.examples) for m in found if (value := m.metrics[name]) is not None]
        if len(known) == len(found):
            values.append(sum(value * examples for value, examples in known) / sum(examples for _, examples in known))
    return values


def as_printed(metric: str, value: float | None) -> str:
    """A number with the digits of the papers: two for ROUGE and perplexity, one for the others; N.A. for ``None``."""
    if value is None:
        return "N.A."
    return f"{value:.{2 if metric.rpartition('/')[2].startswith(('rouge', 'perplexity')) else 1}f}"


def _cells(line: Compared) -> list[str]:
    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    spread = "" if line.runs < 2 else f" ({shown(line.lowest)} … {shown(line.highest)})"
    known = line.published is not None and line.measured is not None
    return [
        line.method,
        line.metric,
        as_printed(line.metric, line.published) if line.printed else "",
        shown(line.measured) + spread,
        f"{line.measured - line.published:+.2f}" if known else "",  # type: ignore[operator]
        str(line.runs) if line.runs else "",
        line.remark,
    ]
