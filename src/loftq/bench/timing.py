"""Seconds of several candidates for the same work, taken in turns so that a noisy minute hits all of them alike.

Every turn calls each candidate once, in an order of its own: threads of one library that go on spinning for a while after their
work would otherwise slow down always the same candidate. What the others have put into the caches is no longer what a candidate
needs, which is also how a layer of a model finds them.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

_MOST_TURNS = 50  # of those beyond what was asked for


def in_turns(
    candidates: Mapping[str, Callable[[], Any]], repeats: int, *, seconds: float = 0.0, warm_up: bool = True
) -> dict[str, tuple[float, ...]]:
    """Every candidate's seconds, ``repeats`` of them or more, the same number for all.

    Args:
        candidates: by name; what they return is dropped.
        repeats: turns, at least.
        seconds: go on for as long with quick candidates: a median of tenths of a millisecond needs more than seven values.
        warm_up: call each once before, for loops to be compiled and memory to be allocated.
    """
    for candidate in candidates.values() if warm_up else ():
        candidate()
    found: dict[str, list[float]] = {name: [] for name in candidates}
    collecting = gc.isenabled()
    gc.disable()
    try:
        began = time.perf_counter()
        turns = 0
        order = list(candidates.items())
        chance = random.Random(0)
        while turns < repeats or (turns < _MOST_TURNS and time.perf_counter() - began < seconds):
            chance.shuffle(order)
            for name, candidate in order:
                started = time.perf_counter()
                candidate()
                found[name].append(time.perf_counter() - started)
            turns += 1
    finally:
        if collecting:
            gc.enable()
    return {name: tuple(values) for name, values in found.items()}
