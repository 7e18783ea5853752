"""Tensors that wait, on disk beyond a budget of memory.

A waiting forward pass holds its tensors in local variables that nobody else can reach. So a tensor stays where it is, and
only its storage is written to a file and freed, to be filled again before the pass runs on.
"""

from __future__ import annotations

import ctypes
import shutil
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

from loftq.checkpoint.writer import disk_errors

_SMALL = 1024  # bytes; such tensors are not worth a file


class _Held:
    """A storage that one pass holds."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = weakref.ref(tensor)
        self.nbytes = tensor.untyped_storage().nbytes()
        self.version = -1
        self.path: Path | None = None
        self.hidden: Tensor | None = None  # a strong reference while its storage is empty


def _bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's storage, by its address: one that numpy has shared could never be freed again."""
    storage = tensor.untyped_storage()
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")


class Spill:
    """Keeps at most ``budget`` bytes of waiting tensors in memory, one pass in addition.

    Raises:
        OutputError: the temporary folder cannot be written, or its disk is full.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.written = 0
        self._folder: Path | None = None
        self._files = 0
        self._held: dict[int, dict[int, _Held]] = {}
        self._in_memory: dict[int, int] = {}

    def suspend(self, key: int, tensors: Iterable[Tensor]) -> None:
        """Pass number ``key`` waits with ``tensors``; write them if memory is short."""
        held = self._held.setdefault(key, {})
        for address in [a for a, h in held.items() if h.tensor() is None]:
            self._forget(held.pop(address))
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() >= _SMALL and storage.resizable() and tensor.device.type == "cpu":
                held.setdefault(storage._cdata, _Held(tensor))
        self._in_memory[key] = sum(h.nbytes for h in held.values())
        if sum(self._in_memory.values()) > self.budget:
            with disk_errors(Path(tempfile.gettempdir())):
                for entry in held.values():
                    self._hide(entry)
            self._in_memory[key] = 0

    def restore(self, key: int) -> None:
        """Fill the storages of pass ``key`` again."""
        with disk_errors(Path(tempfile.gettempdir())):
            for entry in self._held.get(key, {}).values():
                if entry.hidden is None or entry.path is None:
                    continue
                tensor, entry.hidden = entry.hidden, None
                tensor.untyped_storage().resize_(entry.nbytes)
                with open(entry.path, "rb") as stream:
                    if stream.readinto(_bytes_of(tensor)) != entry.nbytes:
                        raise OSError(f"{entry.path} is shorter than what was written")
        self._in_memory[key] = 0

    def drop(self, key: int) -> None:
        """Pass ``key`` waits no more."""
        for entry in self._held.pop(key, {}).values():
            self._forget(entry)
        self._in_memory.pop(key, None)

    def close(self) -> None:
        """Remove the files."""
        self._held, self._in_memory = {}, {}
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _hide(self, entry: _Held) -> None:
        tensor = entry.tensor()
        if tensor is None or entry.hidden is not None:
            return
        if entry.path is None or entry.version != tensor._version:
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="loftq-"))
            if entry.path is None:
                self._files += 1
                entry.path = self._folder / f"{self._files}"
            entry.path.write_bytes(_bytes_of(tensor))
            self.written += entry.nbytes
            entry.version = tensor._version
        entry.hidden = tensor
        tensor.untyped_storage().resize_(0)

    @staticmethod
    def _forget(entry: _Held) -> None:
        if entry.path is not None:
            entry.path.unlink(missing_ok=True)


def reachable_storages(model: nn.Module) -> set[int]:
    """Addresses of the storages that a model's modules hold: what they share or cache is never emptied."""
    found: set[int] = set()
    for module in model.modules():
        for name, value in vars(module).items():
            if name != "_modules":
                _visit(value, 2, found)
    return found


def _visit(value: object, depth: int, found: set[int]) -> None:
    if isinstance(value, Tensor):
        if value.device.type != "meta":
            found.add(value.untyped_storage()._cdata)
    elif depth and isinstance(value, dict):
        for item in value.values():
            _visit(item, depth - 1, found)
    elif depth and isinstance(value, (list, tuple)):
        for item in value:
            _visit(item, depth - 1, found)
