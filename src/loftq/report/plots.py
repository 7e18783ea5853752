"""Pictures of a comparison: perplexity, divergence and errors against measured bits per weight.

Every method has the colour, line and marker of :mod:`loftq.report.palette`; the legend has them in the order of their lines at
the fewest bits. matplotlib is an optional dependency (``loftq[plot]``).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from loftq.errors import ConfigError
from loftq.report.palette import GREY, METHODS, Style, style

PICTURES = {
    "perplexity": "perplexity before fine-tuning",
    "kl": "KL divergence from full precision, nats per token",
    "output_error": "output error ‖(W − Q − L) H^½‖² / ‖W H^½‖²",
    "weight_error": "weight error ‖W − Q − L‖² / ‖W‖²",
    "quantizer": "weight error without adapter ‖W − Q‖² / ‖W‖²",
}
"""Name of a picture -> what its vertical axis is."""
_NO_ADAPTER = ("rtn", "qlora", "gptq")
_BITS = "measured bits per weight, adapters apart"
_HIGHEST = 12.0
"""Perplexities above so many times the original model's are cut off: a broken model would flatten all others."""


class _Line(NamedTuple):
    name: str
    style: Style
    x: list[float]
    y: list[float]


def require_matplotlib() -> None:
    """A :class:`ConfigError` where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("pictures need matplotlib, which is not installed; pip install 'loftq[plot]'")


def plot_comparison(
    rows: Iterable[Mapping[str, Any]], folder: str | Path, *, title: str = "", only: Collection[str] = PICTURES
) -> list[Path]:
    """Every picture that the rows of a ``compare.json`` have numbers for; returns the files.

    Args:
        only: names of :data:`PICTURES` to draw. ``quantizer`` is the weight error of methods without adapter.

    Raises:
        ConfigError: without matplotlib.
    """
    require_matplotlib()
    rows = [row for row in rows if not row.get("error")]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    original = next((row for row in rows if row["method"] == "float"), {}).get("perplexity")
    written = []
    for key in (key for key in PICTURES if key in only and key != "quantizer"):
        lines = _lines(rows, key, 2 if key.endswith("error") else 1)
        if lines:
            level = original if key == "perplexity" else None
            written.append(_draw(lines, folder / f"{key}.png", PICTURES[key], title, level))
    alone = _lines([row for row in rows if row["method"] in _NO_ADAPTER], "weight_error", 2)
    if alone and "quantizer" in only:
        # rate-distortion function of a Gaussian source: no code of R bits a weight has a smaller mean squared error. An
        # adapter is not counted in R, so with one the limit does not hold
        ends = [x for line in alone for x in line.x]
        rates = [min(ends), max(ends)]
        bound = [2.0 ** (-2 * x) for x in rates]
        alone.append(_Line("limit for Gaussian weights, 2^(−2 bits)", METHODS["float"], rates, bound))
        written.append(_draw(alone, folder / "quantizer.png", PICTURES["quantizer"], title))
    return written


def _lines(rows: Sequence[Mapping[str, Any]], key: str, power: int) -> list[_Line]:
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] != "float"):
        points = sorted(
            (row["bpw"], row[key] ** power)
            for row in rows
            if row["method"] == method
            and row.get(key)
            and row.get("bpw")  # neither missing nor 0, which has no logarithm
        )
        if points:
            lines.append(_Line(method, style(method), [x for x, _ in points], [y for _, y in points]))
    return lines


def _draw(lines: list[_Line], path: Path, y_label: str, title: str, level: float | None = None) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("log")
    for line in sorted(lines, key=lambda line: line.y[0], reverse=True):
        colour, dash, marker = line.style
        cut = "" if level is None else cut_values(line.y, _HIGHEST * level)
        name = f"{line.name} (cut off: {cut})" if cut else line.name
        axes.plot(line.x, line.y, color=colour, linestyle=dash, marker=marker, markersize=5, linewidth=1.6, label=name)
    if level is not None:
        axes.axhline(level, color=GREY, linestyle=":", linewidth=1.4, label="full precision")
        cut_above(axes, _HIGHEST * level)
    axes.set_xlabel(_BITS)
    axes.set_ylabel(y_label)
    if title:
        axes.set_title(title, loc="left", fontsize=10)
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    plain_ticks(axes)
    axes.legend(loc="upper right", frameon=False, fontsize=9, ncols=2 if len(lines) > 8 else 1)
    return save_figure(figure, path)


def cut_values(values: Iterable[float], highest: float) -> str:
    """What of a line lies above the vertical axis, for the legend; empty if nothing does."""
    return ", ".join(short(value) for value in values if value > highest)


def cut_above(axes: Any, highest: float) -> None:
    """End a logarithmic vertical axis at a value, if anything that is drawn lies above it."""
    drawn = [float(y) for line in axes.get_lines() for y in line.get_ydata()]
    if max(drawn) > highest:
        axes.set_ylim(min(drawn) / 1.08, highest)


def short(value: float) -> str:
    """Two digits or whole: 4.4e9, 27,000, 264, 61, 5.9."""
    if value >= 1e6:
        return f"{value:.1e}".replace("e+0", "e").replace("e+", "e")
    return f"{float(f'{value:.2g}' if value >= 1e4 or value < 10 else round(value)):,g}"


def save_figure(figure: Any, path: Path) -> Path:
    """Write a PNG file whole, in place of an earlier one."""
    partial = path.with_name(f".{path.stem}.partial.png")
    figure.savefig(partial)
    partial.replace(path)
    return path


def plain_ticks(axes: Any, which: str = "y") -> None:
    """Numbers as people write them along a logarithmic axis: 20 and 3000 rather than powers of ten, and always several."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    axis = axes.yaxis if which == "y" else axes.xaxis
    low, high = axes.get_ylim() if which == "y" else axes.get_xlim()
    if high < 4 * low:  # so short a piece of the axis is nearly linear
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axis.set_minor_locator(NullLocator())
    elif high < 300 * low:
        axis.set_major_locator(
            LogLocator(
                subs=(1, 2, 5) if high > 30 * low else (1, 2, 3, 5) if high > 8 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)
            )
        )
    if low > 1e-4 and high < 1e5:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
