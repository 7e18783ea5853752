"""``results/gpu.json`` as a picture, gpu-products.png: ``python benchmarks/gpu_picture.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from common import HERE, RESULTS
from loftq.report.palette import BITS, GREEN, ORANGE

# grey for what is not packed
COLOURS = {
    "dense bfloat16": "#999999",
    "loftq 2 bits": BITS[2],
    "loftq 3 bits": BITS[3],
    "loftq 4 bits": BITS[4],
    "bitsandbytes NF4": ORANGE,
    "torchao int4": GREEN,
}
HIGHEST = 3.0  # times dense; what is above is cut off, and its value written there


def picture(record: dict[str, Any]) -> Path:
    """One token in microseconds, a group of bars for each shape; more tokens against dense, means over the shapes."""
    rows = record["products"]
    names = [n for n in COLOURS if any(r["name"] == n for r in rows)]
    shapes = list(dict.fromkeys(tuple(r["shape"]) for r in rows))
    tokens = sorted({r["tokens"] for r in rows})
    seconds = {(r["name"], tuple(r["shape"]), r["tokens"]): r["seconds"] for r in rows}
    figure, (one, more) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=(3, 2.6))
    width = 0.86 / len(names)
    for k, name in enumerate(names):
        places = [g + (k - (len(names) - 1) / 2) * width for g in range(len(shapes))]
        one.bar(places, [1e6 * seconds[name, shape, 1] for shape in shapes], width, color=COLOURS[name], label=name)
        ratios = [
            sum(seconds[name, s, t] / seconds["dense bfloat16", s, t] for s in shapes) / len(shapes) for t in tokens
        ]
        places = [g + (k - (len(names) - 1) / 2) * width for g in range(len(tokens))]
        more.bar(places, [min(r, HIGHEST) for r in ratios], width, color=COLOURS[name])
        for place, ratio in zip(places, ratios, strict=True):
            if ratio > HIGHEST:
                more.text(place, HIGHEST, f"{ratio:.0f}", ha="center", va="bottom", fontsize=7)
    for group, shape in enumerate(shapes):
        half = 1e6 * seconds["dense bfloat16", shape, 1] / 2
        one.plot([group - 0.45, group + 0.45], [half, half], color="black", lw=0.8, ls=":")
    one.set_xticks(range(len(shapes)), [f"{m} × {n}" for m, n in shapes])
    one.set_ylabel("microseconds")
    one.set_title("one token (dotted: half of dense)", fontsize=10)
    one.legend(fontsize=8, frameon=False)
    more.axhline(1, color="black", lw=0.8)
    more.set_xticks(range(len(tokens)), [f"{t:,}" for t in tokens])
    more.set_xlabel("tokens")
    more.set_ylabel("time, dense bfloat16 = 1")
    more.set_ylim(0, HIGHEST * 1.08)
    more.set_title("mean over the three shapes", fontsize=10)
    for axes in (one, more):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Products with packed weights, {record['device']['name']}", fontsize=11)
    figure.tight_layout()
    path = HERE / "gpu-products.png"
    figure.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    print(f"-> {picture(json.loads((RESULTS / 'gpu.json').read_text(encoding='utf-8')))}")
