"""Pictures of `EXPERIMENT.json`: the metric before and after training, the loss while training, and `rates`.

| picture | shows |
|---|---|
| `EXPERIMENT-ends.png` | the metric of each start before (hollow) and after (filled), each seed a point |
| `EXPERIMENT-curves.png` | training loss minus LoRA's in the same step, a line for each start, a panel for each width |
| `rates.png` | the metric after training against the learning rate |

They are 8.2 inches wide, with fonts to be read at the width of a page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from experiments import HERE, METHODS

from loftq.report.palette import style
from loftq.report.plots import cut_above, cut_values, plain_ticks, save_figure, short

PLOTS = HERE / "plots"
METRICS = {"perplexity": "perplexity", "accuracy": "accuracy, %", "matthews": "Matthews correlation, %"}
HIGHEST = 12.0
"""Perplexities above so many times that of the original model are cut off: a broken start would flatten all others."""
CURVES = ("wikitext2", "wikitext2_gpu", "stories")
"""Experiments whose curves are worth keeping: those of language models on running text."""

Key = tuple[str, float, str]
Row = dict[str, Any]
Panel = tuple[Any, float, dict[Key, list[Row]]]


def plot(name: str, metric: str) -> list[Path]:
    """Every picture that there are results for."""
    import matplotlib

    matplotlib.use("Agg")
    path = HERE / f"{name}.json"
    if not path.exists():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    PLOTS.mkdir(exist_ok=True)
    if name == "rates":
        return [rates(name, record, metric)]
    drawn = [ends(name, record, metric)]
    if name in CURVES and any(row["method"] == "lora" for row in record["rows"]):
        drawn.append(curves(name, record))
    return drawn


def groups(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """The seeds of each (method, bits, codebook), in the order of METHODS."""
    found: dict[Key, list[Row]] = {}
    for row in sorted(rows, key=lambda row: list(METHODS).index(row["method"])):
        found.setdefault((row["method"], float(row["bits"]), row.get("codebook", "")), []).append(row)
    return found


def widths(rows: Iterable[Row]) -> list[float]:
    return sorted({float(row["bits"]) for row in rows if row["method"] != "lora"})


def within(rows: Iterable[Row], width: float) -> dict[Key, list[Row]]:
    """The groups of a width, and LoRA's, to which all are compared."""
    return {key: seeds for key, seeds in groups(rows).items() if key[1] == width or key[0] == "lora"}


def called(method: str, codebook: str) -> str:
    return METHODS[method] + (f", {codebook}" if codebook else "")


def panels(rows: Sequence[Row], height: float, legend: float) -> tuple[Any, Iterator[Panel]]:
    """A figure, and for each width its axes, the width, and the groups that stand in it: those of the width, and LoRA's.

    Args:
        height: inches of a panel. legend: of what stands below all.
    """
    import matplotlib.pyplot as plt

    bits = widths(rows)
    across = min(len(bits), 3) if len(bits) != 4 else 2
    down = math.ceil(len(bits) / across)
    size = (8.2, height * down + legend + 0.4)
    figure, axes = plt.subplots(down, across, figsize=size, dpi=150, squeeze=False, layout="constrained")
    flat = [panel for line in axes for panel in line]
    for panel in flat[len(bits) :]:
        panel.set_visible(False)

    def each() -> Iterator[Panel]:
        for panel, width in zip(flat, bits, strict=False):
            panel.set_title(f"{width:g} bits", fontsize=10)
            panel.grid(True, color="#DDDDDD", linewidth=0.6)
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(labelsize=9)
            yield panel, width, within(rows, width)

    return figure, each()


def highest(rows: Iterable[Row], metric: str) -> float:
    """The largest value that a picture shows."""
    original = [row["before"][metric] for row in rows if row["method"] == "lora"]
    return HIGHEST * original[0] if metric == "perplexity" and original else math.inf


def ends(name: str, record: dict[str, Any], metric: str) -> Path:
    """The metric before (hollow) and after (filled) training, each seed a point; a line for each start."""
    rows = record["rows"]
    longest = max(len(within(rows, width)) for width in widths(rows))
    figure, drawn = panels(rows, 0.24 * longest + 0.7, 0.4)
    limit = highest(rows, metric)
    for index, (panel, _, here) in enumerate(drawn):
        if metric == "perplexity":
            panel.set_xscale("log")
        outside = []
        for y, ((method, _, codebook), seeds) in enumerate(here.items()):
            before, after = ([row[when][metric] for row in seeds] for when in ("before", "after"))
            shape = {"color": style(method).colour, "marker": "s" if codebook == "uniform" else "o"}
            lines = [np.mean(before), np.mean(after)]
            panel.plot(lines, [y, y], color=shape["color"], linewidth=1.4)
            panel.plot(before, [y] * len(before), linestyle="none", markerfacecolor="white", markersize=6, **shape)
            panel.plot(after, [y] * len(after), linestyle="none", markersize=6, **shape)
            if max(lines) > limit:
                said = f"{short(lines[0])} → {short(lines[1])}" if min(lines) > limit else f"from {short(max(lines))}"
                outside.append((y, said, shape["color"]))
        names = [called(method, codebook) for method, _, codebook in here]
        panel.set_yticks(range(len(here)), names, fontsize=9)
        panel.set_ylim(len(here) - 0.5, -0.5)
        if outside:
            low = min(x for line in panel.get_lines() for x in line.get_xdata())
            panel.set_xlim(low / 1.1, limit)
        for y, said, colour in outside:
            where = {"xytext": (0, 4), "textcoords": "offset points", "ha": "right"}
            panel.annotate(f"{said} ▸", (limit, y), fontsize=8, color=colour, **where)
        if metric == "perplexity":
            plain_ticks(panel, "x")
        panel.set_xlabel(METRICS[metric] if index >= len(widths(rows)) - 2 or len(widths(rows)) < 4 else "", fontsize=9)
    how = "a point a seed, the line joins the means" if len({row["seed"] for row in rows}) > 1 else "one seed"
    figure.suptitle(f"{record['title']}: before (hollow) and after (filled) training\n{how}", fontsize=10)
    return saved(figure, f"{name}-ends")


def smooth(losses: np.ndarray) -> np.ndarray:
    """Mean over a window of a twelfth of the run, shorter at its ends."""
    half = max(1, len(losses) // 24)
    return np.array([losses[max(0, i - half) : i + half + 1].mean() for i in range(len(losses))])


def against(rows: Iterable[Row], lora: dict[int, np.ndarray]) -> np.ndarray:
    """Training loss minus LoRA's with the same seed, thus on the same batches; (seeds, steps) while all of them ran."""
    pairs = [(np.array(row["curve"]), lora[row["seed"]]) for row in rows if row["seed"] in lora]
    steps = min(min(len(mine), len(its)) for mine, its in pairs)
    return np.array([smooth(mine[:steps] - its[:steps]) for mine, its in pairs])


def curves(name: str, record: dict[str, Any]) -> Path:
    """Training loss minus LoRA's in the same step, a panel for each width; the band spans the seeds."""
    rows = record["rows"]
    lora = {row["seed"]: np.array(row["curve"]) for row in rows if row["method"] == "lora"}
    figure, drawn = panels(rows, 2.6, 0.6)
    found: dict[str, Any] = {}
    several = False
    for index, (panel, _, here) in enumerate(drawn):
        tops = []
        for (method, _, codebook), seeds in here.items():
            if method == "lora" or not any(row["seed"] in lora for row in seeds):
                continue
            lines = against(seeds, lora)
            steps = np.arange(1, lines.shape[1] + 1)
            label = called(method, codebook)
            colour = style(method).colour
            (found[label],) = panel.plot(steps, lines.mean(0), color=colour, linewidth=1.5)
            if len(lines) > 1:
                several = True
                panel.fill_between(steps, lines.min(0), lines.max(0), color=colour, alpha=0.2, linewidth=0)
            tops.append((lines.mean(0).max(), lines.mean(0).min(), label))
        found[METHODS["lora"]] = panel.axhline(0, color=style("lora").colour, linestyle=":", linewidth=1.4)
        if tops:
            shown_part(panel, tops)
        if index >= len(widths(rows)) - 2 or len(widths(rows)) < 4:
            panel.set_xlabel("step", fontsize=9)
    figure.supylabel("training loss − LoRA's, nats", fontsize=10)
    what = "line: mean of the seeds, band: from the lowest to the highest" if several else "one seed"
    title = f"{record['title']}: training loss above LoRA's on the same batches"
    figure.suptitle(f"{title}\n{what}; smoothed over a twelfth of the run", fontsize=10)
    names = [
        name
        for name in dict.fromkeys(called(method, codebook) for method, _, codebook in groups(rows))
        if name in found
    ]
    figure.legend(
        [found[name] for name in names], names, loc="outside lower center", ncols=3, frameon=False, fontsize=9
    )
    return saved(figure, f"{name}-curves")


def shown_part(panel: Any, lines: Sequence[tuple[float, float, str]]) -> None:
    """Where the worst line begins far above the others, show only its lower part, and say so.

    Args:
        lines: highest and lowest value of each, and its name.
    """
    (top, low, label), *others = sorted(lines, reverse=True)
    limit = max(1.3 * others[0][0], 1.5 * low) if others else top
    if 2 * limit < top:
        panel.set_ylim(top=limit)
        panel.set_title(f"{panel.get_title()} ({label} begins at {top:.2g})", fontsize=10)


def rates(name: str, record: dict[str, Any], metric: str) -> Path:
    """The metric after training against the learning rate, a line for each start; the best of each is ringed."""
    rows = record["rows"]
    figure, drawn = panels(rows, 3.4, 0.6)
    limit = highest(rows, metric)
    handles: dict[str, Any] = {}
    labels: dict[str, str] = {}
    ticks = sorted({row["learning_rate"] for row in rows})
    for panel, width, here in drawn:
        panel.set_xscale("log")
        panel.set_yscale("log")
        for (method, _, codebook), tried in here.items():
            points = sorted((row["learning_rate"], row["after"][metric]) for row in tried)
            x, y = zip(*points, strict=True)
            colour, _, marker = style(method)
            (line,) = panel.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.5)
            start = called(method, codebook)
            handles[start] = line
            cut = cut_values(y, limit)
            labels[start] = labels.get(start, start) + (f" (cut off at {width:g} bits: {cut})" if cut else "")
            best = min(points, key=lambda point: point[1])
            panel.plot(*best, marker="o", markersize=12, fillstyle="none", color=colour)
        cut_above(panel, limit)
        panel.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
        panel.minorticks_off()
        plain_ticks(panel)
        panel.set_xlabel("learning rate", fontsize=9)
    figure.supylabel(f"{METRICS[metric]} after training", fontsize=10)
    figure.suptitle(f"{record['title']}: best of each ringed", fontsize=10)
    figure.legend(handles.values(), labels.values(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return saved(figure, name)


def saved(figure: Any, name: str) -> Path:
    import matplotlib.pyplot as plt

    path = save_figure(figure, PLOTS / f"{name}.png")
    plt.close(figure)
    return path
