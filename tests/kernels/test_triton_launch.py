"""Calls that are known are launched without asking Triton again; others are not taken for them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install loftq[triton]")

from loftq.kernels.triton_launch import Tuned


class Tuner:
    """Triton's tuner, as far as it is asked: a kernel ``(x, rows, BITS, K)`` whose best K is 64."""

    arg_names = ("x", "rows", "BITS", "K")
    best_config = SimpleNamespace(all_kwargs=lambda: {"K": 64, "num_warps": 1})

    def __init__(self, interpreted: bool = False) -> None:
        self.interpreted = interpreted
        self.asked, self.launched = [], []

    def __getitem__(self, grid):
        def run(*args, **constants):
            self.asked.append((args, constants))
            return None if self.interpreted else Compiled(self)

        return run


class Compiled:
    """What was compiled, which takes all arguments of the kernel and no options."""

    def __init__(self, tuner: Tuner) -> None:
        self.tuner = tuner

    def __getitem__(self, grid):
        return lambda *args: self.tuner.launched.append((grid, *args))


def grid(config):
    return (1024 // config["K"],)


def test_a_known_call_is_launched():
    tuner = Tuner()
    kernel, x = Tuned(tuner), torch.zeros(32)
    for _ in range(3):
        kernel(grid, x, 7, BITS=4, enable_fp_fusion=True)
    assert len(tuner.asked) == 1, "the first call asks, and runs"
    assert tuner.launched == [((16, 1, 1), x, 7, 4, 64)] * 2


@pytest.mark.parametrize(
    "other",
    [
        lambda x: ((x, 8), {"BITS": 4}),
        lambda x: ((x, 7), {"BITS": 3}),
        lambda x: ((x.half(), 7), {"BITS": 4}),
        lambda x: ((x[1:], 7), {"BITS": 4}),  # starts in the middle of 16 bytes
        lambda x: ((x.to("meta"), 7), {"BITS": 4}),
    ],
    ids=["size", "constant", "dtype", "alignment", "device"],
)
def test_another_call_is_not_taken_for_it(other):
    tuner = Tuner()
    kernel, x = Tuned(tuner), torch.zeros(32)
    kernel(grid, x, 7, BITS=4)
    args, constants = other(x)
    kernel(grid, *args, **constants)
    assert len(tuner.asked) == 2


def test_the_interpreter_is_asked_every_time():
    tuner = Tuner(interpreted=True)
    kernel = Tuned(tuner)
    for _ in range(2):
        kernel(grid, torch.zeros(32), 7, BITS=4)
    assert len(tuner.asked) == 2
    assert not tuner.launched
