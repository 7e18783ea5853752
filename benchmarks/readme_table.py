"""Put a quickstart's results into the README's table: ``python benchmarks/readme_table.py loftq-quickstart/quickstart.json``.

Keeps a copy of the results in ``results/quickstart.json``; with ``--check`` only compares that copy with the README.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from loftq.report.tables import number, size

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
COPY = HERE / "results" / "quickstart.json"
BEGIN, END = "<!-- quickstart table -->", "<!-- end of quickstart table -->"


def markdown(results: dict[str, Any]) -> str:
    """The results as the README shows them."""
    lines = [
        "| | bits/weight | checkpoint | adapter | weight error | perplexity | seconds | peak memory |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in results["rows"]:
        cells = [
            row["label"],
            f"{row['bits_per_weight']:.2f}",
            size(row["backbone_bytes"]),
            size(row["adapter_bytes"]) if row["adapter_bytes"] else "",
            "" if row["weight_error"] is None else f"{row['weight_error']:.3f}",
            f"{number(row['perplexity'])} ± {number(row['perplexity_se'])}",
            "" if row["seconds"] is None else f"{row['seconds']:.1f}",
            "" if row["peak_memory_bytes"] is None else size(row["peak_memory_bytes"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    where = f"Measured on {results['machine']['cpu']}, {results['machine']['threads']} threads."
    return "\n".join([*lines, "", where])


def main(argument: str) -> int:
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    shown, _, after = rest.partition(END)
    if argument == "--check":
        return int(shown.strip() != markdown(json.loads(COPY.read_text())))
    results = json.loads(Path(argument).read_text())
    COPY.write_text(json.dumps(results, indent=1) + "\n")
    README.write_text(f"{before}{BEGIN}\n{markdown(results)}\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
