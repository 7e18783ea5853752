"""Every Triton kernel compiles for GPUs, none of which need be there; in a process of its own, outside the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install loftq[triton]")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda 90", "cuda 80", "hip gfx942"])
def test_every_kernel_compiles(target, tmp_path):
    script = Path(__file__).with_name("compile_triton.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script), *target.split()], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = json.loads(done.stdout.splitlines()[-1])["kernels"]
    assert {"_vector", "_matrix", "_transposed", "_dequantize", "_search_scale", "_feedback", "_descend"} <= set(
        compiled
    )


def test_the_cpu_needs_no_triton():
    program = "import sys, torch; from loftq import kernels; kernels.pack(torch.zeros(2, 8, dtype=torch.uint8), 4)"
    check = "; assert not [m for m in sys.modules if 'triton' in m and not m.startswith('torch')]"
    done = subprocess.run([sys.executable, "-c", program + check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
