"""How many threads work on a matrix, and row-parallel execution of compiled loops that release the GIL.

Where torch is built on GNU OpenMP, the loops run in torch's own team of threads. After a matrix product its workers go on
spinning for a while, ready for the next one; threads of our own would have to share the cores with them, which makes a
product with a matrix that was just unpacked take up to twice as long. Elsewhere they run in a pool of our own, not in
numba's: numba's default threading layer aborts the process on concurrent calls, and its OpenMP layer on a fork, and both
happen under a DataLoader.
"""

import ctypes
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

# Matrices of fewer elements are worked on by one thread, whatever the number of cores, so that results are the same.
SMALL = 4_000_000

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

# Below this many elements the hand-over to another thread costs more than the loop.
_MIN_ELEMENTS_PER_THREAD = 1 << 18


def is_small(elements: int) -> bool:
    """Whether one thread works on a matrix of so many elements."""
    return elements < SMALL


@contextmanager
def threads_for(elements: int) -> Iterator[None]:
    """One thread for a small matrix, as many as there are for another.

    BLAS and LAPACK round differently on another number of threads. What several jobs share is computed by whichever comes
    first, so that the number must be the matrix's and not the job's.
    """
    before = torch.get_num_threads()
    if not is_small(elements) or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _openmp() -> Any:
    """``GOMP_parallel(body, data, threads, flags)`` of the GNU OpenMP library that torch has loaded, if it is that one."""
    if not hasattr(os, "RTLD_NOLOAD"):
        return None
    folder = Path(torch.__file__).parent
    for path in sorted([*folder.glob("lib/libgomp*"), *folder.parent.glob("torch.libs/libgomp*")]):
        try:
            parallel = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel
        except (OSError, AttributeError):
            continue
        parallel.argtypes = (_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        parallel.restype = None
        return parallel
    return None


_parallel = _openmp()


def _get_pool(size: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    if _pool is None or _pool_size < size:
        _pool = ThreadPoolExecutor(size, thread_name_prefix="loftq")
        _pool_size = size
    return _pool


def _forget_threads() -> None:
    """Threads do not survive a fork, and GNU OpenMP would wait for its own for ever."""
    global _pool, _pool_size, _parallel
    _pool, _pool_size, _parallel = None, 0, None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def for_rows(loop: Callable[..., Any], rows: int, elements: int, *args: Any) -> None:
    """Call ``loop(first_row, last_row, *args)`` on chunks that cover ``range(rows)``, in parallel.

    Each row must be independent of the others, so that the result does not depend on the number of threads.
    """
    threads = max(1, min(torch.get_num_threads(), elements // _MIN_ELEMENTS_PER_THREAD, rows))
    if threads == 1:
        loop(0, rows, *args)
        return
    edges = [rows * i // threads for i in range(threads + 1)]
    if _parallel is not None:
        _in_team(loop, edges, args)
        return
    pool = _get_pool(threads - 1)
    pending = [pool.submit(loop, edges[i], edges[i + 1], *args) for i in range(1, threads)]
    loop(edges[0], edges[1], *args)
    for future in pending:
        future.result()


def _in_team(loop: Callable[..., Any], edges: list[int], args: tuple[Any, ...]) -> None:
    turns = itertools.count()  # the team may have fewer threads than were asked for, within another team just one
    errors: list[BaseException] = []

    @_BODY
    def body(_: Any) -> None:
        try:
            while (i := next(turns)) < len(edges) - 1:
                loop(edges[i], edges[i + 1], *args)
        except BaseException as error:  # may not pass through C
            errors.append(error)

    _parallel(body, None, len(edges) - 1, 0)
    if errors:
        raise errors[0]
