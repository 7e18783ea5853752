"""Pictures of `EXPERIMENT.json`: the loss while training, and the metric before and after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from experiments import HERE, METHODS

PLOTS = HERE / "plots"
# Okabe and Ito's colours; black is for this project's own start.
COLOURS = {
    "lora": "#666666",
    "qlora": "#E69F00",
    "loftq": "#0072B2",
    "loftq-data": "black",
    "loftq-data-zero": "#009E73",
    "refined": "#D55E00",
}
CODEBOOK_LINES = {"": "-", "nf": "-", "uniform": "--"}
METRICS = {"perplexity": "perplexity", "accuracy": "accuracy, %", "matthews": "Matthews correlation, %"}


def plot(name: str, metric: str) -> list[Path]:
    """Every picture that there are results for."""
    import matplotlib

    matplotlib.use("Agg")
    path = HERE / f"{name}.json"
    if not path.exists():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    PLOTS.mkdir(exist_ok=True)
    return [curves(name, record), ends(name, record, metric)]


def groups(rows: list[dict[str, Any]]) -> dict[tuple[str, float, str], list[dict[str, Any]]]:
    """The seeds of each (method, bits, codebook), in the order of METHODS."""
    found: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: list(METHODS).index(row["method"])):
        found.setdefault((row["method"], float(row["bits"]), row.get("codebook", "")), []).append(row)
    return found


def widths(rows: list[dict[str, Any]]) -> list[float]:
    return sorted({float(row["bits"]) for row in rows if row["method"] != "lora"})


def smooth(losses: np.ndarray) -> np.ndarray:
    """Mean over a window of a twelfth of the run, shorter at its ends."""
    half = max(1, len(losses) // 24)
    return np.array([losses[max(0, i - half) : i + half + 1].mean() for i in range(len(losses))])


def curves(name: str, record: dict[str, Any]) -> Path:
    """Training loss against the step, a panel for each width; the band spans the seeds."""
    import matplotlib.pyplot as plt

    bits = widths(record["rows"])
    figure, panels = plt.subplots(1, len(bits), figsize=(3.4 * len(bits) + 0.6, 3.6), sharey=False, squeeze=False)
    for panel, width in zip(panels[0], bits, strict=True):
        for (method, its, codebook), rows in groups(record["rows"]).items():
            if its != width and method != "lora":
                continue
            lines = np.array(
                [smooth(np.array(row["curve"])) for row in rows if len(row["curve"]) == len(rows[0]["curve"])]
            )
            steps = np.arange(1, lines.shape[1] + 1)
            label = METHODS[method] + (f", {codebook}" if codebook else "")
            style = {"color": COLOURS[method], "linestyle": CODEBOOK_LINES[codebook]}
            panel.plot(steps, lines.mean(0), label=label, linewidth=1.6, **style)
            if len(lines) > 1:
                panel.fill_between(steps, lines.min(0), lines.max(0), color=COLOURS[method], alpha=0.15, linewidth=0)
        panel.set_title(f"{width:g} bits")
        panel.set_xlabel("step")
        panel.set_yscale("log")
        plain_numbers(panel)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("training loss, nats")
    figure.suptitle(record["title"])
    found: dict[str, Any] = {}
    for panel in panels[0]:
        handles, labels = panel.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    columns = min(len(found), 2 * len(bits))
    figure.legend(found.values(), found.keys(), loc="lower center", ncols=columns, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.02 + 0.06 * -(-len(found) // columns), 1, 1))
    return saved(figure, name, "curves")


def plain_numbers(panel: Any) -> None:
    """Numbers, not powers of ten, along a logarithmic axis that spans less than one or two of them."""
    from matplotlib import ticker

    low, high = panel.get_ylim()
    if high < 100 * low:
        panel.yaxis.set_major_formatter(ticker.ScalarFormatter())
        panel.yaxis.set_minor_formatter(ticker.ScalarFormatter())
    if 3 * low < high < 100 * low:  # with all of them their numbers would run into each other
        panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_minor_formatter(ticker.NullFormatter())


def ends(name: str, record: dict[str, Any], metric: str) -> Path:
    """The metric before (hollow) and after (filled) training, each seed a point."""
    import matplotlib.pyplot as plt

    bits = widths(record["rows"])
    figure, panels = plt.subplots(1, len(bits), figsize=(2.8 * len(bits) + 1.2, 3.8), squeeze=False)
    for panel, width in zip(panels[0], bits, strict=True):
        here = [(key, rows) for key, rows in groups(record["rows"]).items() if key[1] == width or key[0] == "lora"]
        for x, ((method, _, codebook), rows) in enumerate(here):
            before, after = ([row[when][metric] for row in rows] for when in ("before", "after"))
            panel.plot([x] * len(before), before, "o", color=COLOURS[method], fillstyle="none")
            panel.plot([x] * len(after), after, "D" if codebook == "uniform" else "o", color=COLOURS[method])
            panel.plot([x, x], [np.mean(before), np.mean(after)], color=COLOURS[method], linewidth=1)
        names = [METHODS[m].replace(" ", "\n") + (f"\n{c}" if c else "") for (m, _, c), _ in here]
        panel.set_xticks(range(len(here)), names, fontsize=8, rotation=45)
        panel.set_xlim(-0.5, len(here) - 0.5)
        panel.set_title(f"{width:g} bits")
        panel.spines[["top", "right"]].set_visible(False)
        if metric == "perplexity":
            panel.set_yscale("log")
            plain_numbers(panel)
    panels[0][0].set_ylabel(f"{METRICS[metric]}: hollow before, filled after")
    figure.suptitle(record["title"])
    figure.tight_layout()
    return saved(figure, name, "ends")


def saved(figure: Any, name: str, what: str) -> Path:
    import matplotlib.pyplot as plt

    path = PLOTS / f"{name}-{what}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
