"""The table of contents of a .gguf file: its metadata and where each tensor's bytes lie."""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

from loftq.errors import SourceError, first_line

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32  # where the file has no general.alignment, by the format's specification
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class Entry(NamedTuple):
    """One tensor of the file: ``shape`` in torch's order, ``begin`` and ``nbytes`` of its data in the file."""

    kind: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class _Cursor:
    """Little-endian values one after another; never reads past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self.data, self.at)
        self.at += struct.calcsize("<" + layout)
        return values

    def text(self) -> str:
        (length,) = self.take("Q")
        return self.take(f"{length}s")[0].decode("utf-8")

    def value(self, kind: int) -> Any:
        """A metadata value; arrays (the vocabulary, the merges) are stepped over and give None."""
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"metadata of unknown type {kind}")
        inner, count = self.take("IQ")
        if inner in _SCALARS:
            self.at += count * struct.calcsize("<" + _SCALARS[inner])
        elif inner == _STRING:
            for _ in range(count):
                (length,) = self.take("Q")
                self.at += length
        else:
            raise ValueError(f"a metadata array of unknown type {inner}")
        return None


def read_contents(path: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Metadata (without its arrays) and tensors of a GGUF file.

    Raises:
        SourceError: if it is no GGUF file, of an unknown version, damaged, or shorter than its tensors need.
    """
    total = path.stat().st_size
    with open(path, "rb") as stream:
        magic = stream.read(4)
        if magic != _MAGIC:
            raise SourceError(f"{path} begins with {magic!r}, expected {_MAGIC!r}; it is not a GGUF file")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                metadata, entries = _parse(_Cursor(data))
            except (struct.error, ValueError, TypeError, OverflowError) as error:
                raise SourceError(
                    f"{path} ({total:,} bytes) is truncated, damaged or of a newer format ({first_line(error)}); "
                    f"fetch the file again or update the gguf package"
                ) from None
    if "general.architecture" not in metadata or not entries:
        raise SourceError(f"{path} names no architecture or holds no tensors, expected a model; check the file")
    needed = max(entry.begin + entry.nbytes for entry in entries.values())
    if needed > total:
        raise SourceError(f"{path} is truncated: it has {total:,} bytes of {needed:,}; fetch the file again")
    return metadata, entries


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, Entry]]:
    import gguf

    _, version, tensor_count, pair_count = cursor.take("4sIQQ")
    if version not in _VERSIONS:
        raise ValueError(f"format version {version}, expected one of {_VERSIONS} in little-endian order")
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.take("I")[0])

    table: list[tuple[str, Any, tuple[int, ...], int]] = []
    for _ in range(tensor_count):
        name = cursor.text()
        shape = cursor.take(f"{cursor.take('I')[0]}Q")[::-1] or (1,)
        kind, offset = cursor.take("IQ")
        table.append((name, gguf.GGMLQuantizationType(kind), shape, offset))

    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if alignment < 1:
        raise ValueError(f"alignment {alignment}")
    start = -(-cursor.at // alignment) * alignment
    entries: dict[str, Entry] = {}
    for name, kind, shape, offset in table:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block or name in entries:
            raise ValueError(f"{name} appears twice or its rows of {shape[-1]} are no multiple of {block}")
        entries[name] = Entry(kind, shape, start + offset, math.prod(shape) // block * size)
    return metadata, entries
