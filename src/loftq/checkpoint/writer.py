"""Writing an output folder that is whole or absent, and can be continued after a kill.

Everything is written to ``OUT.incomplete`` beside the target. The layout of every file is known before the first
tensor is computed, so files are created at full size with their headers, and each tensor goes to its own place. After a
unit (one module, or one tensor passed through) is on disk, a line with its hashes is appended to the journal. A restart
trusts a unit only if its bytes still have those hashes. At the end the folder is renamed to its final name in one step.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from loftq.checkpoint.source import DTYPE_NAMES, as_bytes
from loftq.codec.qtensor import TensorInfo
from loftq.errors import OutputError

JOURNAL = "journal.jsonl"
_WEIGHTS_FILES = (".bin", ".gguf", ".pt", ".pth", ".safetensors")


def lock_file(stream: IO[bytes], path: Path) -> None:
    """Keep other processes from writing ``path`` for as long as ``stream``, a file in it, is open.

    Raises:
        OutputError: another process does.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(f"another process is writing {path}; wait for it or choose another folder") from None
    except OSError:  # a file system without locks
        return


def replace_text(path: Path, text: str, *, errors: str = "strict") -> None:
    """Write a file whole: under another name first, then renamed, in place of an earlier one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8", errors=errors)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def check_file(path: str | Path, what: str) -> None:
    """Refuse a file that could not be written, before there is anything to write; its folder is created.

    Raises:
        OutputError: it is a folder, or nothing can be written there.
    """
    path = Path(os.path.expanduser(path))
    with disk_errors(path):
        if path.is_dir() or not path.name:
            raise OutputError(f"{path} is a folder, expected a file for {what}; name one")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(
                f"the disk of {path} is full ({error.strerror}); free some space and run the same command again, it "
                f"continues where it stopped"
            ) from None
        file = next((p for p in (path, *path.parents) if os.path.isfile(p)), None)
        if file is not None and error.errno in (errno.EEXIST, errno.ENOTDIR):
            raise OutputError(f"{file} is a file, expected a folder; choose another name") from None
        where = f" ({error.filename})" if error.filename else ""
        raise OutputError(
            f"cannot write to {path}: {error.strerror or error}{where}; choose another folder or make this one writable"
        ) from None


def header_bytes(tensors: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """A safetensors header, length included, and each tensor's first byte in the file.

    Tensors are laid out as the safetensors library lays them out (wide dtypes first, then by name), so that saving the
    loaded tensors with it gives the same bytes.
    """
    order = sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, _dtype_rank(tensors[n].dtype), n))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    begins = {}
    for name in order:
        info = tensors[name]
        begins[name] = offset
        header[name] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data = len(text) + 8
    return len(text).to_bytes(8, "little") + text, {name: data + begin for name, begin in begins.items()}


def _dtype_rank(dtype: torch.dtype) -> int:
    """Safetensors orders dtypes of one width by their position in its enumeration, later ones first."""
    order = ["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64", "I64"]
    return -order.index(DTYPE_NAMES[dtype])


class Staging:
    """The unfinished output folder.

    Args:
        out_dir: where the finished folder will be.
        fingerprint: what the output depends on; an unfinished run with another one is not continued.
        files: relative file name -> tensors it will hold.
        resume: continue an unfinished run; otherwise it is removed.

    Raises:
        OutputError: ``out_dir`` or the folder beside it holds something else, an unfinished run does not fit, another
            process is writing, or the disk is full.
    """

    def __init__(
        self, out_dir: Path, fingerprint: Mapping[str, Any], files: Mapping[str, Mapping[str, TensorInfo]], resume: bool
    ) -> None:
        out_dir = Path(os.path.realpath(out_dir))  # "." has no name, and a link to a folder cannot be replaced by one
        self.out_dir = out_dir
        self.path = out_dir.parent / (out_dir.name + ".incomplete")
        self.done: dict[str, dict[str, Any]] = {}
        self._where: dict[str, tuple[str, int, TensorInfo]] = {}
        self._streams: dict[str, Any] = {}
        with disk_errors(out_dir):
            check_target(out_dir)
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_ours()
            self._journal = open(self.path / JOURNAL, "a+b")  # noqa: SIM115 - kept open: its lock is this run's
            try:
                self._open(fingerprint, files, resume)
            except BaseException:
                self.close()  # its lock would keep this process from trying again
                raise

    def _open(
        self, fingerprint: Mapping[str, Any], files: Mapping[str, Mapping[str, TensorInfo]], resume: bool
    ) -> None:
        lock_file(self._journal, self.path)
        lines = self._read_journal()
        if lines and lines[0] != fingerprint and resume:
            raise OutputError(self._explain(lines[0], fingerprint))
        if not resume or not lines:
            self._remove_except({JOURNAL})
            self._journal.truncate(0)
            self._append(fingerprint)
            lines = []
        self._remove_except({JOURNAL, *files})  # shards of another size, or a finished run's metadata
        self._create(files)
        for line in lines[1:]:
            if all(self._is_intact(name, digest) for name, digest in line["sha256"].items()):
                self.done[line["unit"]] = line

    def _check_ours(self) -> None:
        if not (self.path / JOURNAL).exists() and (found := next(self.path.iterdir(), None)) is not None:
            raise OutputError(
                f"{self.path}, where unfinished work is kept, holds something else ({found.name}); move it away or choose "
                f"another folder"
            )

    def _remove_except(self, kept: set[str]) -> None:
        for path in [p for p in self.path.rglob("*") if p.is_symlink() or not p.is_dir()]:
            if path.relative_to(self.path).as_posix() not in kept:
                path.unlink()

    def _read_journal(self) -> list[dict[str, Any]]:
        self._journal.seek(0)
        lines: list[dict[str, Any]] = []
        whole = 0
        for raw in self._journal.read().split(b"\n")[:-1]:
            try:
                line = json.loads(raw)
            except ValueError:
                break
            if not isinstance(line, dict) or (lines and not {"unit", "sha256", "record"} <= set(line)):
                break
            lines.append(line)
            whole += len(raw) + 1
        self._journal.truncate(whole)  # a line cut off by a kill
        return lines

    def _explain(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
        changed = _first_difference(old, new)
        return (
            f"{self.path} holds an unfinished run with other settings ({changed}); finish that one, delete the folder, "
            f"or start over with --no-resume"
        )

    def _append(self, line: Mapping[str, Any]) -> None:
        self._journal.write(json.dumps(line).encode() + b"\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def _create(self, files: Mapping[str, Mapping[str, TensorInfo]]) -> None:
        layouts = {file: header_bytes(tensors) for file, tensors in files.items()}
        sizes = {f: len(layouts[f][0]) + sum(info.nbytes for info in tensors.values()) for f, tensors in files.items()}
        self._check_room(sizes)
        for file, tensors in files.items():
            (header, begins), size = layouts[file], sizes[file]
            path = self.path / file
            path.parent.mkdir(exist_ok=True)
            stream = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 - closed in finish
            self._streams[file] = stream
            if hasattr(os, "posix_fallocate"):
                before = path.stat().st_size
                try:
                    os.posix_fallocate(stream.fileno(), 0, size)  # a full disk shows now rather than hours later
                except OSError:
                    stream.truncate(before)  # it may have taken all the space there was
                    raise
            stream.truncate(size)
            stream.write(header)
            stream.flush()
            for name, info in tensors.items():
                self._where[f"{file}:{name}"] = (file, begins[name], info)

    def _check_room(self, sizes: Mapping[str, int]) -> None:
        paths = [self.path / file for file in sizes]
        needed = sum(sizes.values()) - sum(getattr(p.stat(), "st_blocks", 0) * 512 for p in paths if p.exists())
        disk = shutil.disk_usage(self.path)
        if disk.total and needed > disk.free:
            raise OutputError(
                f"the disk of {self.out_dir} has {disk.free / 1e9:,.3f} GB left, but the output takes {needed / 1e9:,.3f} GB "
                f"more; free some space and run the same command again"
            )

    def _is_intact(self, key: str, digest: str) -> bool:
        if key not in self._where:
            return False
        file, begin, info = self._where[key]
        return _digest_range(self._streams[file], begin, info.nbytes) == digest

    def write_unit(self, unit: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Put tensors (``file:name`` -> tensor) in their places and record the unit as done."""
        digests = {}
        with disk_errors(self.out_dir):
            touched = set()
            for key, tensor in tensors.items():
                file, begin, info = self._where[key]
                if (tensor.dtype, tuple(tensor.shape)) != info:
                    raise AssertionError(f"{key} is {tensor.dtype} {tuple(tensor.shape)}, planned {info}")
                data = memoryview(as_bytes(tensor.cpu().contiguous()))
                stream = self._streams[file]
                stream.seek(begin)
                stream.write(data)
                digests[key] = hashlib.sha256(data).hexdigest()
                touched.add(file)
            for file in touched:
                self._streams[file].flush()
                os.fsync(self._streams[file].fileno())
            self.done[unit] = {"unit": unit, "sha256": digests, "record": dict(record)}
            self._append(self.done[unit])

    def read(self, key: str) -> Tensor:
        """A tensor (``file:name``) of a unit that is done."""
        file, begin, info = self._where[key]
        stream = self._streams[file]
        stream.seek(begin)
        data = bytearray(stream.read(info.nbytes))
        return torch.frombuffer(data, dtype=info.dtype).view(info.shape)

    def digests(self) -> dict[str, str]:
        """``file:name`` -> sha256 of every tensor written so far."""
        return {key: digest for line in self.done.values() for key, digest in line["sha256"].items()}

    def finish(self) -> None:
        """Rename the folder to its final name; it appears there complete."""
        with disk_errors(self.out_dir):
            for stream in self._streams.values():
                stream.close()
            for file in self.path.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as stream:
                        os.fsync(stream.fileno())
            check_target(self.out_dir)
            os.replace(self.path, self.out_dir)
            (self.out_dir / JOURNAL).unlink()
            self._journal.close()

    def close(self) -> None:
        """Leave the unfinished folder for a later run."""
        for stream in (*self._streams.values(), self._journal):
            with contextlib.suppress(OSError):  # a full disk refuses once more what is still in the buffer
                stream.close()


def remove_leftovers(out_dir: Path) -> None:
    """Remove the journal from a finished folder, which a kill right after the renaming leaves."""
    (out_dir / JOURNAL).unlink(missing_ok=True)


def check_target(out_dir: Path) -> None:
    """An :class:`OutputError` unless ``out_dir`` is absent, and named as a folder is, or an empty folder."""
    if out_dir.is_dir():
        found = next(out_dir.iterdir(), None)
        if found is not None:
            raise OutputError(f"{out_dir} is not empty (it holds {found.name}); choose another folder or empty it")
        if os.path.ismount(out_dir):
            raise OutputError(f"{out_dir} is a mount point, which cannot be replaced; choose a folder in it")
    elif out_dir.exists():
        raise OutputError(f"{out_dir} is a file, expected a folder to create; choose another name")
    elif out_dir.suffix.lower() in _WEIGHTS_FILES:
        raise OutputError(
            f"{out_dir} has the name of a file of weights, but a folder is written; leave {out_dir.suffix} out"
        )


def _digest_range(stream: Any, begin: int, size: int) -> str:
    digest = hashlib.sha256()
    stream.seek(begin)
    while size > 0 and (chunk := stream.read(min(size, 1 << 22))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


def _first_difference(old: Any, new: Any, path: str = "") -> str:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                return _first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    return f"{path} was {old!r}, now {new!r}"
