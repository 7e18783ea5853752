"""Every benchmark that takes minutes, in turn, each in a process of its own: ``make bench``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
COMMANDS = {
    "weight_error": [str(HERE / "weight_error.py")],
    "loftq bench": ["-m", "loftq.cli", "bench", "--out", str(HERE / "results" / "bench.json")],
    "table7": [str(HERE / "table7.py")],
}

if __name__ == "__main__":
    for name, arguments in COMMANDS.items():
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, *arguments], check=True)
