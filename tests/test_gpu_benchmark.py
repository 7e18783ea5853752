"""benchmarks/gpu.py without a GPU: it says so, and its code runs on tiny shapes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import gpu

    return gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_says_so(gpu, capsys):
    assert gpu.main([]) == 0
    assert capsys.readouterr().out.strip().endswith("nothing was measured.")


@pytest.mark.slow
def test_every_part_runs(gpu, capsys, monkeypatch):
    recorded = []
    monkeypatch.setattr(gpu, "record", lambda *args: recorded.append(args))
    assert gpu.main(["--device", "cpu", "--quick"]) == 0
    out = capsys.readouterr().out
    for part in (
        "64x64, 1 tokens",
        "training step of a layer, 1 x 16 tokens, loftq 4 bits",
        "full SVD: ",
        "64x64, 3 bits, scale search: ",
    ):
        assert part in out
    assert not recorded, "a run on the CPU is no result"


def test_bounds_are_ratios_to_what_is_compared_with(gpu):
    def row(name, seconds):
        return {"shape": (8, 8), "tokens": 1, "name": name, "seconds": seconds}

    rows = [row("dense bfloat16", 6.0), row("bitsandbytes NF4", 4.0), *(row(f"loftq {b} bits", b) for b in (2, 3, 4))]
    steps = [{"name": "loftq 4 bits", "batch": 1, "length": 2, "seconds": 1.0}]
    quantizing = [{"name": "default, 4 bits", "seconds_all": 60.0}]
    found = {b["bound"]: (b["ratio"], b["met"]) for b in gpu.bounds(rows, steps, quantizing)}
    assert found["one token, 8x8, 2 bits: as fast as bitsandbytes' NF4"] == (2.0, True)
    assert found["one token, 8x8, 3 bits: twice as fast as dense bfloat16"] == (1.0, True)
    assert found["one token, 8x8, 4 bits: twice as fast as dense bfloat16"] == (0.75, False)
    assert found["training step, 1 x 2 tokens, 4 bits: as fast as bitsandbytes"] == (None, None)
    assert found["224 matrices, default, 4 bits: within two minutes"] == (2.0, True)
