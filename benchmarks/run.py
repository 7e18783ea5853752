"""Every benchmark in turn, each in a process of its own: ``make bench``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = ("weight_error", "dequantize_speed", "solver_speed", "table7")

if __name__ == "__main__":
    for name in SCRIPTS:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, str(Path(__file__).parent / f"{name}.py")], check=True)
