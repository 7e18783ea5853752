"""Pictures of an ablation, after the figures of LoftQ (arXiv 2310.08659): initial discrepancy, and metrics along a factor.

matplotlib is an optional dependency (``loftq[plot]``). Only pictures that the sweep has values for are made.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loftq.ablate.discrepancy import Discrepancy
from loftq.ablate.factors import Factors
from loftq.ablate.series import Series, names, series
from loftq.ablate.settings import Ablation
from loftq.ablate.table import AFTER, BEFORE, Tables
from loftq.compare import FLOAT
from loftq.report.palette import GREY, Style, style
from loftq.report.plots import plain_ticks, require_matplotlib, save_figure

_VARIANTS = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ("-", "v"), ("--", "P"), (":", "X"), ("-.", "*"))
_ALONG = {"iters": "alternations T (0: Q alone)", "bits": "bits per weight", "rank": "rank of the adapters"}
_NORMS = {"frobenius": r"$\|W-Q-BA\|_F$", "spectral": r"$\|W-Q-BA\|_2$ (spectral norm)"}
_RELATIVE = {
    "frobenius_relative": r"$\|W-Q-BA\|_F\;/\;\|W\|_F$",
    "spectral_relative": r"$\|W-Q-BA\|_2\;/\;\|W\|_2$ (spectral norm)",
}


def plot_sweep(folder: str | Path, settings: Ablation, *, title: str | None = None) -> list[Path]:
    """Draw what the tables of a folder hold of a sweep; returns the files, which lie beside the tables.

    ``discrepancy.png`` has both norms by kind of module, ``discrepancy_layers.png`` by layer, a column for each bits;
    ``metric_vs_iters.png``, ``metric_vs_bits.png`` and ``metric_vs_rank.png`` what was measured along a factor.

    Args:
        title: what the pictures' titles begin with; the name of the model's folder without.

    Raises:
        ConfigError: without matplotlib. SourceError: the tables are damaged.
    """
    require_matplotlib()
    folder = Path(os.path.expanduser(folder))
    title = Path(settings.model).name if title is None else title
    tables = Tables(folder)
    written = []
    lines = series(settings, tables.rows, "bits")
    for name, by in (("discrepancy", "kind"), ("discrepancy_layers", "layer")):
        if path := _discrepancy(lines, tables.modules, by, folder / f"{name}.png", title):
            written.append(path)
    for along, label in _ALONG.items():
        found = [line for line in series(settings, tables.rows, along) if len(line.cells) > 1]
        if found and (
            path := _metrics(found, along, label, tables, folder / f"metric_vs_{along}.png", settings, title)
        ):
            written.append(path)
    return written


def _discrepancy(
    lines: list[Series], modules: dict[Factors, list[Discrepancy]], by: str, path: Path, model: str
) -> Path | None:
    widths = sorted({bits for line in lines for bits in line.cells})
    groups = list(
        dict.fromkeys(
            getattr(m, by)
            for line in lines
            for row in line.cells.values()
            for m in modules.get(row.factors, [])
            if m.layer is not None or by == "kind"
        )
    )
    if len(groups) < 2:
        return None
    groups = groups if by == "kind" else sorted(groups)
    from matplotlib.ticker import MaxNLocator

    width = max(2.6, 0.4 * len(groups)) if by == "kind" else 2.9
    figure, panels = _panels(len(_NORMS), len(widths), width, 2.6)
    labels, common = names(lines, "bits")
    styles = _styles(lines, "bits")
    for row, (norm, title) in enumerate(_NORMS.items()):
        for column, bits in enumerate(widths):
            axes = panels[row][column]
            for index, line in enumerate(lines):
                if bits not in line.cells:
                    continue
                points = _by_group(modules.get(line.cells[bits].factors, []), by, norm)
                # kinds have no order that a line could follow, and equal values must not hide each other
                aside = 0.7 * ((index + 0.5) / len(lines) - 0.5) if by == "kind" else 0.0
                known = [(x + aside, points[g]) for x, g in enumerate(groups) if g in points]
                colour, dash, marker = styles[index]
                axes.plot(
                    *zip(*known, strict=True) if known else ([], []),
                    color=colour,
                    marker=marker,
                    linestyle=dash if by == "layer" else "none",
                    markersize=5 if by == "kind" else 3,
                    linewidth=1.4,
                    label=labels[index],
                )
            if row == 0:
                axes.set_title(f"{bits:g} bits", fontsize=9)
            if column == 0:
                axes.set_ylabel(title, fontsize=9)
            axes.set_ylim(bottom=0)
            if by == "layer":
                axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
                axes.set_xlabel("layer" if row else "", fontsize=9)
            else:
                axes.set_xticks(range(len(groups)), groups if row else [], rotation=90, fontsize=8)
                axes.set_xlim(-0.6, len(groups) - 0.4)
                for edge in range(1, len(groups)):
                    axes.axvline(edge - 0.5, color="#EEEEEE", linewidth=0.8)
    over = "kind of module" if by == "kind" else "layer"
    _finish(figure, panels, f"{model}, {common}: initial discrepancy, mean over each {over}")
    return save_figure(figure, path)


def _styles(lines: list[Series], along: str) -> list[Style]:
    """The colour is the method's, line and marker are those of the bits, rank, T and codebook, solid with the largest T.

    Lines that would still look alike, of one method with several calibrations say, take the next that is free.
    """

    def other(line: Series) -> tuple[Any, ...]:
        return tuple(getattr(line.factors, n) for n in ("bits", "rank", "iters", "codebook") if n != along)

    ordered = sorted(lines, key=lambda line: -line.factors.iters)
    variants = {key: k for k, key in enumerate(dict.fromkeys(other(line) for line in ordered))}
    taken: set[tuple[str, int]] = set()
    found = []
    for line in lines:
        colour, variant = style(str(line.factors.method)).colour, variants[other(line)] % len(_VARIANTS)
        while (colour, variant) in taken and len(taken) < len(_VARIANTS):
            variant = (variant + 1) % len(_VARIANTS)
        taken.add((colour, variant))
        found.append(Style(colour, *_VARIANTS[variant]))
    return found


def _by_group(modules: Sequence[Discrepancy], by: str, norm: str) -> dict[Any, float]:
    found: dict[Any, list[float]] = {}
    for module in modules:
        found.setdefault(getattr(module, by), []).append(getattr(module, norm))
    return {group: sum(values) / len(values) for group, values in found.items()}


def _metrics(
    lines: list[Series], along: str, label: str, tables: Tables, path: Path, settings: Ablation, model: str
) -> Path | None:
    columns = dict(_RELATIVE)
    if settings.text is not None:
        columns["perplexity"] = "perplexity before fine-tuning"
    if settings.train is not None:
        metric = settings.train.metric_names[0]
        columns |= {f"{BEFORE}{metric}": f"{metric} before", f"{AFTER}{metric}": f"{metric} after fine-tuning"}
    values = {n: [_points(line, n) for line in lines] for n in columns}
    columns = {n: text for n, text in columns.items() if any(len(points) > 1 for points in values[n])}
    if not columns:
        return None
    from matplotlib.ticker import NullLocator

    across = 2 if len(columns) in (2, 4) else min(3, len(columns))
    figure, panels = _panels(math.ceil(len(columns) / across), across, 3.6 if across < 3 else 2.8, 2.9)
    flat = [axes for row in panels for axes in row]
    labels, common = names(lines, along)
    styles = _styles(lines, along)
    full = next((row for row in tables.rows.values() if row.factors.method == FLOAT), None)
    ticks = sorted({x for line in lines for x in line.cells})
    for axes, (name, text) in zip(flat, columns.items(), strict=False):
        for index, points in enumerate(values[name]):
            colour, dash, marker = styles[index]
            axes.plot(
                *zip(*points, strict=True) if points else ([], []),
                color=colour,
                marker=marker,
                linestyle=dash,
                markersize=4,
                linewidth=1.4,
                label=labels[index],
            )
        if name == "perplexity" and full is not None:
            axes.axhline(full.perplexity, color=GREY, linestyle=":", linewidth=1.4, label="full precision")
        seen = [y for points in values[name] for _, y in points]
        if min(seen) > 0 and max(seen) > 4 * min(seen):
            axes.set_yscale("log")
            plain_ticks(axes)
        elif name in _RELATIVE:
            axes.set_ylim(bottom=0)
        if along == "rank":
            axes.set_xscale("log", base=2)
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.set_xlabel(label, fontsize=9)
        axes.set_ylabel(text, fontsize=9)
    for axes in flat[len(columns) :]:
        axes.set_visible(False)
    _finish(figure, panels, f"{model}, {common}")
    return save_figure(figure, path)


def _points(line: Series, name: str) -> list[tuple[float, float]]:
    found = ((x, row.value(name)) for x, row in line.cells.items())
    return sorted((x, y) for x, y in found if y is not None and math.isfinite(y))


def _panels(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns + 0.8, height * rows + 1.2), dpi=150, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _finish(figure: Any, panels: Any, title: str) -> None:
    """What all panels have in common: grid, one legend below, a title."""
    named: dict[str, Any] = {}
    for axes in (axes for row in panels for axes in row):
        axes.grid(True, axis="y", color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        named |= {text: handle for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.suptitle(title, fontsize=10)
    longest = max(map(len, named), default=1)
    columns = max(1, min(len(named), int(figure.get_size_inches()[0] * 12 // (longest + 8)) or 1))
    figure.legend(named.values(), named, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
