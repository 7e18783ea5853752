"""The results of ``run.py`` as the tables of ``benchmarks/README.md``: ``python benchmarks/init/table.py`` puts them there.

With ``--check`` it only compares them with what stands there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import between  # noqa: E402 - beside this folder, which is no package

README = HERE.parent / "README.md"
BEGIN, END = "<!-- init tables -->", "<!-- end of init tables -->"
ORDER = ("smollm2", "stories", "minilm")
FLOAT = "float"
SAID = {
    "perplexity": "Perplexity of six of the methods; the tables have all",
    "output_error": "Their output error, the square of the table's",
    "quantizer": "Weight error of three quantizers without adapter, the square of the table's: `qlora` the papers' quantizer, "
    "`rtn` the default one, `gptq` the default one with error feedback, which trades weight error for output error",
}
"""A picture that ``run.py`` may keep -> what it shows."""
NUMBERS = {
    "perplexity": "perplexity",
    "KL divergence": "kl",
    "output error": "output_error",
    "weight error": "weight_error",
    "seconds": "seconds",
}


def value(number: float | None, digits: int = 3) -> str:
    """Few digits, large numbers as powers of ten."""
    if number is None:
        return "–"
    return f"{number:.1e}" if number >= 1e4 else f"{number:.{digits}g}" if number < 100 else f"{number:.0f}"


def with_error(number: float | None, error: float | None) -> str:
    """``number ± error``, the error with two digits."""
    if number is None or error is None:
        return "–"
    return value(number, 4) if number >= 1e4 else f"{value(number, 4)} ± {value(error, 2)}"


def table(record: dict[str, Any]) -> list[str]:
    """One model: a block of columns for each width, a line for each method."""
    rows = {(row["method"], row["bits"]): row for row in record["rows"] if row.get("error") is None}
    methods = list(dict.fromkeys(m for m, _ in rows if m != FLOAT))
    widths = sorted({bits for m, bits in rows if m != FLOAT})
    language = any(row["perplexity"] is not None for row in rows.values())
    lines = []
    for what, key in NUMBERS.items():
        estimated = key in ("perplexity", "kl")
        if estimated and not language:
            continue
        best = {
            bits: min((r for (m, b), r in rows.items() if b == bits and m != FLOAT), key=lambda r, key=key: r[key])
            for bits in widths
        }
        lines += [f"{what}:", "", "| | " + " | ".join(f"{bits:g} bits" for bits in widths) + " |"]
        lines += ["|---|" + "---:|" * len(widths)]
        for method in methods:
            cells = []
            for bits in widths:
                row = rows.get((method, bits))
                if row is None:
                    shown = ""
                else:
                    shown = with_error(row[key], row[f"{key}_se"]) if estimated else value(row[key])
                cells.append(f"**{shown}**" if row is best[bits] and key != "seconds" else shown)
            lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def markdown() -> str:
    """All results there are."""
    parts = []
    for name in ORDER:
        path = HERE / f"{name}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        reference = next((row for row in record["rows"] if row["method"] == FLOAT), None)
        scored = reference is not None and reference["perplexity"] is not None
        parts += [
            f"**{record['model']}**" + (f", perplexity of the original {reference['perplexity']:.2f}" if scored else "")
        ]
        widths = sorted(
            {(row["bits"], round(row["bpw"], 2)) for row in record["rows"] if row["method"] == "loftq-data"}
        )
        parts += ["Measured bits per weight of `loftq-data`: " + ", ".join(f"{bpw:.2f}" for _, bpw in widths) + "."]
        parts += [f"{record['machine']['cpu']}, {record['machine']['threads']} threads. `{record['command']}`", ""]
        for picture, said in SAID.items():
            if (HERE / "plots" / name / f"{picture}.png").exists():
                parts += [f"{said}:", "", f"![{picture.replace('_', ' ')}](init/plots/{name}/{picture}.png)", ""]
        parts += table(record)
    return "\n".join(parts).strip()


def main(arguments: list[str]) -> int:
    return between(README, (BEGIN, END), markdown(), check="--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
