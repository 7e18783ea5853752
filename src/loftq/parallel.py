"""Several matrices side by side, each on one core.

Operations on a matrix of a few million elements are too short to share between cores: most of the time would go into
waiting for each other, and on a busy machine much more. So small jobs run whole, one a core. A large job runs alone
and shares its operations between all cores, which also bounds the memory to the work space of one large matrix.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from loftq.kernels.threads import is_small

Key = TypeVar("Key")
Result = TypeVar("Result")


def timed(job: Callable[[], Result]) -> tuple[Result, float]:
    started = time.perf_counter()
    result = job()
    return result, time.perf_counter() - started


def run_side_by_side(
    jobs: Iterable[tuple[Key, Callable[[], Result]]], size: Callable[[Key], int], device: torch.device | None = None
) -> Iterator[tuple[Key, tuple[Result, float]]]:
    """Yield ``(key, (result, seconds))`` in the order of ``jobs``; ``size`` is that of the largest matrix a job works on.

    On a ``device`` other than the CPU, which is the default, every job runs alone: a GPU is one for all of them.
    Jobs are drawn only as they are started, at most one more than there are cores ahead of what has been yielded. An
    exception of a job is raised here; jobs that run already are waited for, no other is started.
    """
    threads = torch.get_num_threads()
    on_cpu = device is None or device.type == "cpu"
    waiting: deque[tuple[Key, Future[tuple[Result, float]]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="loftq-matrix", initializer=_use_one_core)
    try:
        for key, job in jobs:
            if on_cpu and is_small(size(key)):
                if len(waiting) > threads:
                    first, future = waiting.popleft()
                    yield first, future.result()
                waiting.append((key, pool.submit(timed, job)))
            else:
                while waiting:
                    first, future = waiting.popleft()
                    yield first, future.result()
                yield key, timed(job)
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # threads started from now on: the pool's own setting is the last one made


def _use_one_core() -> None:
    torch.set_num_threads(1)
