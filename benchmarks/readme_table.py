"""Put a quickstart's results into the README's table: ``python benchmarks/readme_table.py loftq-quickstart/quickstart.json``.

Keeps a copy of the results in ``results/quickstart.json``; with ``--check`` only compares that copy with the README.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from common import between
from loftq.quickstart import COLUMNS, Row, cells

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
COPY = HERE / "results" / "quickstart.json"
MARKS = "<!-- quickstart table -->", "<!-- end of quickstart table -->"


def markdown(results: dict[str, Any]) -> str:
    """The results as the README shows them."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    lines += ["| " + " | ".join(cells(Row(**row))) + " |" for row in results["rows"]]
    where = f"Measured on {results['machine']['cpu']}, {results['machine']['threads']} threads."
    return "\n".join([*lines, "", where])


def main(arguments: list[str]) -> int:
    (argument,) = arguments
    if argument == "--check":
        return between(README, MARKS, markdown(json.loads(COPY.read_text())), check=True)
    results = json.loads(Path(argument).read_text())
    COPY.write_text(json.dumps(results, indent=1) + "\n")
    return between(README, MARKS, markdown(results), check=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
