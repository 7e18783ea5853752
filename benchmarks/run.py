"""Every benchmark that takes minutes, in turn, each in a process of its own: ``make bench``.

A file in ``results/`` for each: those that benchmarks/README.md quotes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def bench(file: str, *suites: str) -> list[str]:
    """The command of ``loftq bench`` that writes one file of results."""
    return ["-m", "loftq.cli", "bench", *suites, "--out", str(RESULTS / file)]


COMMANDS = {
    "weight_error": [str(HERE / "weight_error.py")],
    "packed layers": bench("bench_linear.json", "dequantize", "linear"),
    "solver": bench("bench_solver.json", "solver"),
    "SmolLM2": bench("bench_model.json", "model"),
    "table7": [str(HERE / "table7.py")],
}

if __name__ == "__main__":
    for name, arguments in COMMANDS.items():
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, *arguments], check=True)
