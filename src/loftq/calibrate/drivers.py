"""Forward passes that stop in front of every block and wait for its output.

Each batch's pass runs in a thread of its own, but only while the main thread waits for it: at any time one thread runs,
so the order of all operations is fixed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

_local = threading.local()


class Stop(BaseException):
    """Ends a pass whose remainder is of no interest; not an ``Exception``, so that no model swallows it."""


class Call(NamedTuple):
    """A block's call that waits for its output."""

    block: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Driver:
    """One batch's forward pass.

    Attributes:
        call: the block's call in front of which the pass waits; ``None`` when it has ended.

    ``grad=True`` lets the pass build a graph for a backward pass of its own.
    """

    def __init__(self, run: Callable[[], Any], *, grad: bool = False) -> None:
        self.call: Any = None
        self._grad = grad
        self._run = run
        self._to_thread: SimpleQueue[tuple[bool, Any]] = SimpleQueue()
        self._to_main: SimpleQueue[Any] = SimpleQueue()
        # a daemon, so that a process that ends early is not kept by a pass that waits
        self._thread = threading.Thread(target=self._main, name="loftq-forward", daemon=True)

    def start(self) -> None:
        """Run to the first block.

        Raises:
            Exception: whatever the model raised.
        """
        self._thread.start()
        self._wait()

    def resume(self, output: Any) -> None:
        """Hand over the output of the block in front of which the pass waits, and run to the next block."""
        self.call = None
        self._to_thread.put((True, output))
        del output
        self._wait()

    def stop(self) -> None:
        """End the pass where it is."""
        self.call = None
        if self._thread.is_alive():
            self._to_thread.put((False, None))
            self._thread.join(timeout=10)

    def _wait(self) -> None:
        message = self._to_main.get()
        if isinstance(message, BaseException):
            raise message
        self.call = message

    def suspend(self, call: Any) -> Any:
        """In the pass's own thread: wait for the output of ``call``."""
        self._to_main.put(call)
        del call
        proceed, output = self._to_thread.get()
        if not proceed:
            raise Stop
        return output

    def _main(self) -> None:
        _local.driver = self
        # What runs here is short; a pool of threads for each of many passes would only cost memory.
        torch.set_num_threads(1)
        try:
            with torch.set_grad_enabled(self._grad):
                self._run()
            self._to_main.put(None)
        except Stop:
            self._to_main.put(None)
        except BaseException as error:  # raised again in the main thread
            self._to_main.put(error)


def current_driver() -> Driver | None:
    """The driver in whose thread this is called; ``None`` in the main thread."""
    return getattr(_local, "driver", None)


def start_all(drivers: list[Driver], started: Callable[[int], None]) -> None:
    """Start each pass and call ``started`` with its position."""
    threads = torch.get_num_threads()
    try:
        for position, driver in enumerate(drivers):
            driver.start()
            started(position)
    finally:
        torch.set_num_threads(threads)  # for threads of others that start later; a pass has set its own to 1
