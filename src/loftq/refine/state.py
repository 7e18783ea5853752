"""What an interrupted refinement needs to continue: one file, replaced as a whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from loftq.checkpoint.source import SafetensorsSource, as_bytes
from loftq.checkpoint.writer import disk_errors, header_bytes, lock_file
from loftq.codec.qtensor import TensorInfo
from loftq.errors import OutputError, SourceError

STATE = "state.safetensors"
PROGRESS = "progress"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, complete or absent, on the disk when the function returns."""
    header, begins = header_bytes({n: TensorInfo(t.dtype, tuple(t.shape)) for n, t in tensors.items()})
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "wb") as stream:
        stream.write(header)
        for name in begins:
            stream.write(memoryview(as_bytes(tensors[name].detach().cpu().contiguous())))
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


class SavedState:
    """The folder ``TARGET.refining`` beside the target, with the state of an unfinished run.

    Args:
        target: the folder that will hold the result.
        fingerprint: what the result depends on.
        resume: continue; otherwise start over.

    Raises:
        OutputError: an unfinished run with other settings, or another process at work on it.
    """

    def __init__(self, target: Path, fingerprint: Mapping[str, Any], resume: bool) -> None:
        self.path = work_folder(target)
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.progress: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        with disk_errors(target):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / "lock", "a+b")  # noqa: SIM115 - held as long as the run
            try:
                lock_file(self._lock, self.path)
                if resume:
                    self._read()
                else:
                    (self.path / STATE).unlink(missing_ok=True)
            except BaseException:
                self.close()
                raise

    def _read(self) -> None:
        if not (self.path / STATE).exists():
            return
        try:
            source = SafetensorsSource(self.path, single=STATE)
            saved = json.loads(bytes(as_bytes(source.read(PROGRESS))))
            found, progress = saved["fingerprint"], saved["progress"]
        except (SourceError, ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"{self.path / STATE} is damaged ({error}); delete it or start over with --no-resume"
            ) from None
        if found != self.fingerprint:
            key = next(k for k in sorted({*found, *self.fingerprint}) if found.get(k) != self.fingerprint.get(k))
            raise OutputError(
                f"{self.path} holds an unfinished refinement with another {key} ({_short(found.get(key))}, now "
                f"{_short(self.fingerprint.get(key))}); finish that one, delete the folder, or start over with --no-resume"
            )
        self.progress = progress
        self.tensors = {name: source.read(name) for name in source.tensors if name != PROGRESS}

    def save(self, progress: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Replace the state. ``tensors`` are not kept in memory."""
        import torch

        text = json.dumps({"fingerprint": self.fingerprint, "progress": progress}).encode()
        everything = {**tensors, PROGRESS: torch.frombuffer(bytearray(text), dtype=torch.uint8)}
        with disk_errors(self.path):
            write_tensors(self.path / STATE, everything)

    def close(self) -> None:
        """Leave the state for a later run, if there is any."""
        self._lock.close()
        if self.path.exists() and not (self.path / STATE).exists() and not (self.path / "old").exists():
            shutil.rmtree(self.path, ignore_errors=True)

    def remove(self) -> None:
        """The run is finished."""
        self._lock.close()
        (self.path / STATE).unlink(missing_ok=True)  # first: what follows may be interrupted
        shutil.rmtree(self.path, ignore_errors=True)


def work_folder(target: Path) -> Path:
    """Where unfinished work on a folder is kept."""
    return target.parent / f"{target.name}.refining"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
