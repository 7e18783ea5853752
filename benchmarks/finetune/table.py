"""The results of ``run.py`` as the tables of ``benchmarks/README.md``: ``python benchmarks/finetune/table.py`` puts them there.

With ``--check`` it only compares them with what stands there.
"""

from __future__ import annotations

import json
import statistics
import sys
from typing import Any

from experiments import HERE, METHODS  # which lets `common` be found
from pictures import CURVES, groups, widths

from common import between

README = HERE.parent / "README.md"
BEGIN, END = "<!-- finetune tables -->", "<!-- end of finetune tables -->"
TABLES = {
    "wikitext2": {"perplexity": "perplexity"},
    "gsm8k": {"perplexity": "perplexity of the answers", "gsm8k": "accuracy, %"},
    "stories": {"perplexity": "perplexity"},
    "sst2": {"accuracy": "accuracy, %"},
    "cola": {"matthews": "Matthews correlation, %"},
}


def number(value: float) -> str:
    """Four digits; large numbers as powers of ten."""
    return f"{value:.1e}" if abs(value) >= 1e4 else f"{value:.0f}" if abs(value) >= 1e3 else f"{value:.4g}"


def spread(values: list[float]) -> str:
    """Mean ± sample standard deviation over the seeds."""
    if len(values) == 1:
        return number(values[0])
    return f"{number(statistics.mean(values))} ± {number(float(f'{statistics.stdev(values):.2g}'))}"


def table(record: dict[str, Any], metric: str) -> list[str]:
    """A line for each method, two columns for each width: before and after."""
    bits = widths(record["rows"])
    found = groups(record["rows"])
    lines = [
        "| | " + " | ".join(f"{b:g} bits, before | after" for b in bits) + " |",
        "|---|" + "---:|---:|" * len(bits),
    ]
    for method, codebook in dict.fromkeys((m, c) for m, _, c in found):
        cells = []
        for width in bits:
            rows = found.get((method, 16.0 if method == "lora" else width, codebook))
            for when in ("before", "after"):
                values = [row[when][metric] for row in rows or () if metric in row[when]]
                cells.append(spread(values) if values else "")
        shown = "LoRA, 16 bits" if method == "lora" else METHODS[method] + (f", {codebook}" if codebook else "")
        lines.append(f"| {shown} | " + " | ".join(cells) + " |")
    return lines


def markdown() -> str:
    """All results there are."""
    parts = []
    for name, metrics in TABLES.items():
        path = HERE / f"{name}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        for metric, shown in metrics.items():
            parts += [f"**{record['title']}**, {shown}", "", *table(record, metric), ""]
        parts += [
            f"{record['machine']['cpu']}.",
            "",
            f"![before and after training](finetune/plots/{name}-ends.png)",
            "",
        ]
        if name in CURVES:
            parts += [
                "While training, against LoRA on the same batches:",
                "",
                f"![training loss](finetune/plots/{name}-curves.png)",
                "",
            ]
    return "\n".join(parts).strip()


def main(arguments: list[str]) -> int:
    return between(README, (BEGIN, END), markdown(), check="--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
