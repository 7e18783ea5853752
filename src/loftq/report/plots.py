"""Pictures of a comparison: perplexity, divergence and errors against measured bits per weight, and errors layer by layer.

Sixteen methods are too many for colours alone: every method has a colour and a line style of its own, and its name stands
at one end of its line, the one where the lines are further apart, moved away from its neighbours. matplotlib is an optional
dependency (``loftq[plot]``).
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from loftq.errors import ConfigError
from loftq.report.cells import RESULTS, read_layers, read_rows

# Okabe and Ito's colours, which stay apart for colour-blind readers; black is for this project's own method.
COLOURS = {
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "green": "#009E73",
    "blue": "#0072B2",
    "red": "#D55E00",
    "pink": "#CC79A7",
}
_STYLES = {
    "loftq-data": ("black", "-", "o"),
    "loftq-data-zero": ("black", ":", "v"),
    "auto": ("black", "--", "s"),
    "loftq": (COLOURS["blue"], "-", "o"),
    "loftq-svd-first": (COLOURS["blue"], ":", "v"),
    "qlora": (COLOURS["orange"], "-", "o"),
    "rtn": (COLOURS["orange"], ":", "v"),
    "gptq": (COLOURS["orange"], "--", "s"),
    "pissa": (COLOURS["pink"], "--", "s"),
    "qpissa": (COLOURS["pink"], "-", "o"),
    "lqer": (COLOURS["green"], ":", "v"),
    "qera-approx": (COLOURS["green"], "--", "s"),
    "qera": (COLOURS["green"], "-", "o"),
    "cloq": (COLOURS["red"], "-", "o"),
    "caldera": (COLOURS["red"], "--", "s"),
    "lq-lora": (COLOURS["sky"], "-", "o"),
    "srr": (COLOURS["sky"], "--", "s"),
}
_OTHERS = [(c, s, "D") for s in ("-.", (0, (5, 1, 1, 1, 1, 1))) for c in ("#666666", *COLOURS.values())]
_OWN = ("loftq-data", "loftq-data-zero", "auto")
_NO_ADAPTER = ("rtn", "qlora", "gptq")
_BITS = "measured bits per weight, adapters apart"
_LAYER = re.compile(r"\.(\d+)\.")


class _Line(NamedTuple):
    name: str
    x: list[float]
    y: list[float]


def require_matplotlib() -> None:
    """A :class:`ConfigError` where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("pictures need matplotlib, which is not installed; pip install 'loftq[plot]'")


def plot_comparison(rows: Iterable[Mapping[str, Any]], folder: str | Path, *, title: str = "") -> list[Path]:
    """Every picture that the rows of a ``compare.json`` have numbers for; returns the files.

    Raises:
        ConfigError: without matplotlib.
    """
    require_matplotlib()
    rows = [row for row in rows if not row.get("error")]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    baseline = next((row for row in rows if row["method"] == "float"), {})
    pictures = (
        ("perplexity", "perplexity before fine-tuning", baseline.get("perplexity")),
        ("kl", "KL divergence from full precision, nats per token", None),
        ("output_error", "output error ‖(W − Q − L) H^½‖² / ‖W H^½‖²", None),
        ("weight_error", "weight error ‖W − Q − L‖² / ‖W‖²", None),
    )
    written = []
    for key, label, level in pictures:
        lines = _lines(rows, key, 2 if key.endswith("error") else 1)
        if lines:
            written.append(_draw(lines, folder / f"{key}.png", _BITS, label, title, level))
    alone = _lines([row for row in rows if row["method"] in _NO_ADAPTER], "weight_error", 2)
    if alone:
        # rate-distortion function of a Gaussian source: no code of R bits a weight has a smaller mean squared error. An
        # adapter is not counted in R, so with one the limit does not hold
        ends = [x for line in alone for x in line.x]
        rates = [min(ends), max(ends)]
        limit = _Line("limit 2^(−2R) for\nGaussian weights", rates, [2.0 ** (-2 * x) for x in rates])
        label = "weight error without adapter ‖W − Q‖² / ‖W‖²"
        written.append(_draw(alone, folder / "quantizer.png", _BITS, label, title, None, limit))
    return written


def plot_folder(folder: str | Path, pictures: str | Path, *, title: str = "") -> list[Path]:
    """:func:`plot_comparison` of a folder that ``loftq compare`` has written, and its errors by layer for every bits."""
    folder, pictures = Path(folder), Path(pictures)
    rows = [row for row in read_rows(folder / RESULTS) if not row.get("error")]
    written = plot_comparison(rows, pictures, title=title)
    for bits in dict.fromkeys(row["bits"] for row in rows if row["method"] != "float"):
        for key in ("output_error", "weight_error"):
            errors = {
                row["method"]: {m["name"]: m[key] for m in read_layers(folder, row["method"], bits) if m[key]}
                for row in rows
                if row["bits"] == bits
            }
            if any(_LAYER.search(name) for modules in errors.values() for name in modules):
                label = f"{key.replace('_', ' ')}, mean over the layer"
                path = pictures / f"layers_{key}_{bits:g}.png"
                written.append(
                    plot_layers(errors, path, label=label, title=f"{title}{', ' if title else ''}{bits:g} bits")
                )
    return written


def plot_layers(
    errors: Mapping[str, Mapping[str, float]], path: str | Path, *, label: str = "output error", title: str = ""
) -> Path:
    """Mean error of every layer (transformer block), one line a method.

    Args:
        errors: method -> module name -> error. Modules outside the layers are left out.
        path: the PNG file to write. label: of the vertical axis.

    Raises:
        ConfigError: without matplotlib, or if no module belongs to a layer.
    """
    require_matplotlib()
    lines = []
    for method, modules in errors.items():
        layers: dict[int, list[float]] = {}
        for name, value in modules.items():
            match = _LAYER.search(name)
            if match:
                layers.setdefault(int(match[1]), []).append(value)
        if layers:
            order = sorted(layers)
            lines.append(_Line(method, [float(k) for k in order], [sum(layers[k]) / len(layers[k]) for k in order]))
    if not lines:
        raise ConfigError(
            "no module has the number of a layer in its name, expected names such as model.layers.0.q_proj"
        )
    return _draw(lines, Path(path), "layer", label, title)


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
            lines.append(_Line(method, [x for x, _ in points], [y for _, y in points]))
    return lines


def _draw(
    lines: list[_Line],
    path: Path,
    x_label: str,
    y_label: str,
    title: str,
    level: float | None = None,
    limit: _Line | None = None,
) -> Path:
    from matplotlib.figure import Figure

    height = max(4.2, 0.24 * (len(lines) + 2) + 1.2)
    figure = Figure(figsize=(8.2, height), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("log")
    others = iter(_OTHERS * 3)
    end = _clearer_end(lines)
    ends: list[tuple[float, float, str, Any]] = []
    for line in sorted(lines, key=lambda line: line.name in _OWN):  # this project's on top
        colour, style, marker = _STYLES.get(line.name) or next(others)
        many = len(line.x) > 12
        width = 2.2 if line.name in _OWN else 1.4
        axes.plot(
            line.x,
            line.y,
            color=colour,
            linestyle=style,
            marker=None if many else marker,
            markersize=4,
            linewidth=width,
        )
        ends.append((line.x[end], line.y[end], line.name, colour))
    if limit is not None:
        axes.plot(limit.x, limit.y, color="#888888", linestyle=(0, (1, 2)), linewidth=1.4)
        ends.append((limit.x[end], limit.y[end], limit.name, "#666666"))
    if level is not None:
        axes.axhline(level, color="#888888", linestyle=(0, (1, 2)), linewidth=1.4)
        ends.append((max(e[0] for e in ends) if end else min(e[0] for e in ends), level, "full precision", "#666666"))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if title:
        axes.set_title(title, loc="left", fontsize=10)
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    if end == 0:  # the names take the vertical axis's place
        axes.yaxis.tick_right()
        axes.yaxis.set_label_position("right")
    axes.spines[["top", "left" if end == 0 else "right"]].set_visible(False)
    plain_ticks(axes, all(float(x).is_integer() for line in lines for x in line.x))
    _label_ends(axes, ends, left=end == 0)
    return save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> Path:
    """Write a PNG file whole, in place of an earlier one."""
    partial = path.with_name(f".{path.stem}.partial.png")
    figure.savefig(partial)
    partial.replace(path)
    return path


def _clearer_end(lines: Sequence[_Line]) -> int:
    """0 or -1: the end at which the lines are further apart, where their names are told apart more easily."""
    first, last = (math.log(max(line.y[k] for line in lines) / min(line.y[k] for line in lines)) for k in (0, -1))
    return 0 if first > 1.5 * last else -1


def plain_ticks(axes: Any, whole: bool) -> None:
    """Numbers as people write them: 20 and 3000 rather than powers of ten, unless there are too many decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    low, high = axes.get_ylim()
    if high / low < 300:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low > 8 else (1, 1.5, 2, 3, 4, 5, 6, 8)))
    if low > 1e-4 and high < 1e5:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _label_ends(axes: Any, ends: Sequence[tuple[float, float, str, Any]], left: bool) -> None:
    """The lines' names beside the axes at the heights where they end, moved apart where they would overlap."""
    import numpy as np

    points = axes.get_window_extent().height * 72 / axes.figure.dpi  # close enough before the layout is final
    step = 10.5 / (0.9 * points)
    ordered = sorted(ends, key=lambda end: end[1])
    low, high = np.log(axes.get_ylim())
    wanted = np.array([(np.log(y) - low) / (high - low) for _, y, _, _ in ordered])
    rows = np.array([1 + text.count("\n") for _, _, text, _ in ordered])
    heights = _apart(wanted, step * rows)
    for (x, y, text, colour), place in zip(ordered, heights, strict=True):
        axes.annotate(
            text,
            (x, y),
            xytext=(-0.06 if left else 1.06, place),
            horizontalalignment="right" if left else "left",
            textcoords="axes fraction",
            color=colour,
            fontsize=8,
            fontweight="bold" if text in _OWN else "normal",
            verticalalignment="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.5,
                "shrinkA": 1,
                "shrinkB": 3,
                "alpha": 0.6,
                "relpos": (float(left), 0.5),  # from the middle of the name's near edge, so that no line crosses a name
            },
        )


def _apart(wanted: Any, sizes: Any) -> Any:
    """Heights from 0 to 1 in ascending order, each apart from the next by the mean of their sizes, close to ``wanted``.

    Neighbours that overlap become one group, centred where its members want to be (isotonic regression by pooling).
    """
    import numpy as np

    offsets = np.concatenate([[0.0], np.cumsum((sizes[:-1] + sizes[1:]) / 2)])
    groups: list[list[float]] = []  # sum of what its members want, and their number
    for value in wanted - offsets:
        groups.append([float(value), 1.0])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] >= groups[-1][0] / groups[-1][1]:
            total, count = groups.pop()
            groups[-1][0] += total
            groups[-1][1] += count
    means = np.concatenate([np.full(int(count), total / count) for total, count in groups])
    return np.clip(means, sizes[0] / 2, max(sizes[0] / 2, 1 - sizes[-1] / 2 - offsets[-1])) + offsets
