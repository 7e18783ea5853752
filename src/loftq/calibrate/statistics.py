"""Statistics of all layers' inputs, and the file that keeps them."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loftq.checkpoint.source import as_bytes, read_header
from loftq.checkpoint.writer import disk_errors
from loftq.errors import SourceError
from loftq.plan.targets import ModulePlan
from loftq.solver.importance import InputStatistics

FORMAT_VERSION = 1
_METADATA = "loftq_statistics"
OF_INPUT = ("second_moment", "mean_abs", "drift")
OF_LAYER = ("output_moment", "guided_moment", "fisher_rows", "fisher_columns")


class Statistics(Mapping[str, InputStatistics]):
    """Layer name -> its :class:`InputStatistics`. Layers with one input share an object, or its tensors. An expert's are
    under the name of the parameter and its number, such as ``….experts.down_proj.3``.

    Args:
        layers: the statistics.
        summary: what is known of the calibration, as JSON: name and sha256 of the text, windows, length, tokens.
        source_sha256: file name -> sha256 of the model's weight files; empty for a live model.
    """

    def __init__(
        self,
        layers: Mapping[str, InputStatistics],
        summary: Mapping[str, Any] | None = None,
        source_sha256: Mapping[str, str] | None = None,
    ) -> None:
        self._layers = dict(layers)
        self.summary = dict(summary or {})
        self.source_sha256 = dict(source_sha256 or {})

    def __getitem__(self, name: str) -> InputStatistics:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def of_module(self, plan: ModulePlan) -> InputStatistics | list[InputStatistics] | None:
        """What is known of a module's inputs, of experts each one's; ``None`` if nothing is."""
        found = [self._layers[part.name] for part in plan.matrices() if part.name in self._layers]
        if not found or not plan.experts:
            return found[0] if found else None
        return found

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, which appears whole or not at all. A tensor that layers share is stored once.

        Raises:
            OutputError: it cannot be written.
        """
        from safetensors.torch import save_file

        path = Path(os.path.expanduser(path))
        keys: dict[int, str] = {}
        tensors: dict[str, Tensor] = {}
        layers: dict[str, dict[str, Any]] = {}
        for name, entry in self._layers.items():
            layers[name] = {"tokens": entry.tokens}
            for field in (*OF_INPUT, *OF_LAYER):
                value = getattr(entry, field)
                if value is None:
                    continue
                if id(value) not in keys:
                    keys[id(value)] = f"{len(keys)}.{field}"
                    tensors[keys[id(value)]] = value.detach().float().cpu().contiguous().clone()
                layers[name][field] = keys[id(value)]
        described = {
            "format": FORMAT_VERSION,
            "layers": layers,
            "summary": self.summary,
            "source_sha256": self.source_sha256,
        }
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        with disk_errors(path):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                _write(save_file, tensors, partial, {_METADATA: json.dumps(described)})
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, source_sha256: Mapping[str, str] | None = None) -> Statistics:
        """Read a file written by :meth:`save`.

        Args:
            path: the file.
            source_sha256: file name -> sha256 of the model that the statistics must belong to.

        Raises:
            SourceError: no such file, damaged, or of another model.
        """
        path = Path(os.path.expanduser(path))
        if not path.is_file():
            raise SourceError(f"{path} does not exist, expected the file that `loftq calibrate` writes")
        header = {name: (info, begin, size) for name, info, begin, size in read_header(path)}
        try:
            result = cls._read(path, header)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise SourceError(f"{path} holds no intact statistics ({reason}); collect them again") from None
        if source_sha256 is not None and dict(source_sha256) != result.source_sha256:
            raise SourceError(
                f"the statistics in {path} are of another model ({_digests(result.source_sha256)}, expected "
                f"{_digests(source_sha256)}); collect them again"
            )
        return result

    @classmethod
    def _read(cls, path: Path, header: Mapping[str, tuple[Any, int, int]]) -> Statistics:
        with open(path, "rb") as stream:
            described = json.loads(
                json.loads(stream.read(int.from_bytes(stream.read(8), "little")))["__metadata__"][_METADATA]
            )
            if described["format"] != FORMAT_VERSION:
                raise ValueError(f"its format is {described['format']}, expected {FORMAT_VERSION}")
            tensors: dict[str, Tensor] = {}
            inputs: dict[tuple[Any, ...], InputStatistics] = {}
            layers: dict[str, InputStatistics] = {}
            for name, values in described["layers"].items():
                found = {}
                for field in (f for f in (*OF_INPUT, *OF_LAYER) if f in values):
                    stored = values[field]
                    if stored not in tensors:
                        tensors[stored] = _read_tensor(stream, *header[stored])
                    found[field] = tensors[stored]
                key = (values["tokens"], *(values.get(field) for field in OF_INPUT))
                if key not in inputs:
                    of_input = {field: found[field] for field in OF_INPUT if field in found}
                    inputs[key] = InputStatistics(tokens=int(values["tokens"]), **of_input)
                of_layer = {field: found[field] for field in OF_LAYER if field in found}
                layers[name] = inputs[key].of_layer(**of_layer) if of_layer else inputs[key]
            return cls(layers, described["summary"], described["source_sha256"])


def _write(save: Any, tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError

    try:
        save(tensors, path, metadata=metadata)
    except SafetensorError as error:  # it wraps the operating system's refusal
        raise OSError(0, str(error)) from None


def _read_tensor(stream: Any, info: Any, begin: int, size: int) -> Tensor:
    tensor = torch.empty(info.shape, dtype=info.dtype)
    stream.seek(begin)
    if size and stream.readinto(memoryview(as_bytes(tensor))) != size:
        raise ValueError("it is truncated")
    return tensor


def _digests(source: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {digest[:12]}" for name, digest in sorted(source.items())) or "no files"
