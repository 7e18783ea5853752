"""Where a model comes from: a folder of safetensors, a GGUF file, or a hub id. One tensor is read at a time."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from loftq.codec.qtensor import TensorInfo
from loftq.errors import SourceError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# Copied beside the weights, where the source has them: tokenizer, generation settings, chat template, processors.
_EXTRAS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
)

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Source(Protocol):
    """A checkpoint that is read tensor by tensor."""

    path: Path
    files: list[Path]
    tensors: dict[str, TensorInfo]

    def config(self) -> PretrainedConfig:
        """The model's configuration, without a quantization config."""

    def read(self, name: str, index: int | None = None) -> Tensor:
        """One tensor, or the element ``index`` of its first dimension, in memory of its own."""

    def save_extras(self, out_dir: Path) -> None:
        """Write tokenizer and generation settings to ``out_dir``."""


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one sentence."""
    try:
        yield
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror or error}); check the file and the disk") from None


def open_source(source: str | Path, revision: str | None = None) -> Source:
    """A folder with safetensors, a ``.gguf`` file, or a hub id (downloaded through ``huggingface_hub``).

    Raises:
        SourceError: if there is no such thing, or what is there cannot be read.
    """
    path = Path(os.path.expanduser(source))
    with read_errors(path):
        is_dir, exists = path.is_dir(), path.exists()
    if is_dir:
        return SafetensorsSource(path)
    if path.suffix == ".gguf":
        from loftq.checkpoint.gguf_source import GGUFSource

        return GGUFSource(path)
    if exists:
        raise SourceError(f"{path} is a file, expected a folder with safetensors, a .gguf file or a hub id")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
        raise SourceError(f"{source} does not exist, expected a folder with safetensors, a .gguf file or a hub id")
    return SafetensorsSource(_download(str(source), revision))


def hub_snapshot(path: Path) -> tuple[str, str] | None:
    """(repository, commit) of a folder in the hub's cache, which another machine may have elsewhere or fetch itself."""
    repo = path.parent.parent.name
    if path.parent.name != "snapshots" or not repo.startswith("models--"):
        return None
    return repo.removeprefix("models--").replace("--", "/"), path.name


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.safetensors.index.json", "config.json", *_EXTRAS]
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise SourceError(
            f"{repo_id} is no folder here and could not be fetched from the hub ({first_line(error)}); check the name, the "
            f"network and, for a gated model, `hf auth login`"
        ) from None
    if not any((folder / name).exists() for name in (SINGLE, INDEX)):
        raise without_safetensors_on_hub(repo_id, revision)
    return folder


class SafetensorsSource:
    """A local folder with ``config.json`` and ``model.safetensors``, or shards with their index.

    Tensors are read by offset rather than through a memory map, whose pages would count as this process's memory.

    Raises:
        SourceError: a missing or truncated file, an index that names a missing shard or tensor, pickled weights only.
    """

    def __init__(self, path: Path, *, single: str = SINGLE) -> None:
        self.path = path
        self.files = self._shards(single)
        self.tensors: dict[str, TensorInfo] = {}
        self._where: dict[str, tuple[Path, int, int]] = {}
        self._following: dict[str, int] = {}  # bytes of the tensor after it in its file
        for file in self.files:
            entries = read_header(file)
            sizes = [size for *_, size in entries]
            for (name, info, begin, size), following in zip(entries, [*sizes[1:], 0], strict=True):
                self.tensors[name] = info
                self._where[name] = (file, begin, size)
                self._following[name] = following
        missing = [name for name in self._expected if name not in self.tensors]
        if missing:
            raise SourceError(
                f"{path / INDEX} lists {missing[0]} (and {len(missing) - 1} more) that no shard holds; fetch the "
                f"checkpoint again"
            )

    def _shards(self, single: str) -> list[Path]:
        self._expected: list[str] = []
        index = self.path / INDEX
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise SourceError(
                    f"{index} has no weight_map from tensor names to file names; fetch the checkpoint again"
                )
            self._expected = list(weight_map)
            files = [self.path / name for name in sorted(set(weight_map.values()))]
            missing = [f.name for f in files if not f.exists()]
            if missing:
                raise SourceError(
                    f"{self.path} lacks {len(missing)} of {len(files)} shards that its index names ({missing[0]}); "
                    f"fetch the checkpoint again"
                )
            return files
        if (self.path / single).exists():
            return [self.path / single]
        raise without_safetensors(self.path, single)

    def config(self) -> PretrainedConfig:
        return read_config(self.path)

    def read(self, name: str, index: int | None = None) -> Tensor:
        file, begin, size = self._where[name]
        info = self.tensors[name]
        following = self._following[name]
        if index is not None:
            size = following = size // info.shape[0]
            begin += index * size
            info = TensorInfo(info.dtype, info.shape[1:])
        buffer = torch.empty(size, dtype=torch.uint8)
        with read_errors(file), open(file, "rb") as stream:
            stream.seek(begin)
            if stream.readinto(memoryview(as_bytes(buffer))) != size:
                raise SourceError(f"{file} ends inside tensor {name}; fetch the checkpoint again")
            if following and hasattr(os, "posix_fadvise"):  # the next tensor is read while this one is worked on
                os.posix_fadvise(stream.fileno(), begin + size, following, os.POSIX_FADV_WILLNEED)
        return buffer.view(info.dtype).view(info.shape) if size else torch.empty(info.shape, dtype=info.dtype)

    def save_extras(self, out_dir: Path) -> None:
        for pattern in _EXTRAS:
            for file in self.path.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, out_dir / file.name)


def without_safetensors(folder: Path, single: str) -> SourceError:
    """What to say of a folder that has neither the file ``single`` nor shards with their index."""
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pth"), *folder.glob("*.pt")])
    if pickled:
        return SourceError(
            f"{folder} has only pickled weights ({pickled[0].name}), which are never opened because unpickling "
            f"runs code; convert them to safetensors first"
        )
    return SourceError(f"{folder} has neither {single} nor {INDEX}; expected a folder with a model checkpoint")


def without_safetensors_on_hub(repo_id: str, revision: str | None) -> SourceError:
    """What to say of a repository whose weights, if it has any, are pickled."""
    return SourceError(
        f"{repo_id} has no safetensors on the hub at the revision {revision or 'main'}, and pickled weights are never opened "
        f"because unpickling runs code; name a revision that has them with --revision, or convert them first"
    )


def read_header(file: Path) -> list[tuple[str, TensorInfo, int, int]]:
    """(name, dtype and shape, first byte, bytes) of every tensor in a safetensors file.

    Raises:
        SourceError: if the header is damaged or promises more bytes than the file has.
    """
    try:
        with read_errors(file), open(file, "rb") as stream:
            total = file.stat().st_size
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > total - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        entries = []
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if entry["dtype"] not in _DTYPES:
                raise SourceError(
                    f"{file} holds {name} as {entry['dtype']}, expected one of {', '.join(_DTYPES)}; convert that tensor first"
                )
            info = TensorInfo(_DTYPES[entry["dtype"]], tuple(entry["shape"]))
            if begin < 0 or min(info.shape, default=0) < 0 or end - begin != info.nbytes:
                raise ValueError(f"{name} has bytes {begin} to {end} for shape {info.shape}")
            entries.append((name, info, 8 + length + begin, end - begin))
    except SourceError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise SourceError(f"{file} is no intact safetensors file ({error}); fetch the checkpoint again") from None
    needed = max((begin + size for _, _, begin, size in entries), default=8 + length)
    if needed != total:
        raise SourceError(
            f"{file} has {total} bytes where its header promises {needed}: it is truncated or damaged; fetch the "
            f"checkpoint again"
        )
    return entries


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, or a :class:`SourceError` that names the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{file} cannot be read as JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise SourceError(f"{file} holds a {type(value).__name__}, expected a JSON object; fetch it again")
    return value


def open_config(source: str | Path, revision: str | None = None) -> PretrainedConfig:
    """The transformers configuration that a ``config.json``, a folder, a ``.gguf`` file or a hub id holds; no weights.

    Raises:
        SourceError: if there is no such thing, transformers does not know the architecture, or it is quantized already.
    """
    path = Path(os.path.expanduser(source))
    with read_errors(path):
        exists = path.exists()
    if path.suffix == ".gguf":
        return open_source(path).config()
    if exists:
        return read_config(path)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
        raise SourceError(f"{source} does not exist, expected a config.json, a folder with one or a hub id")
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(str(source), "config.json", revision=revision)
    except Exception as error:
        raise SourceError(
            f"{source} is no file or folder here, and its config.json could not be fetched from the hub "
            f"({first_line(error)}); check the name, the network and, for a gated model, `hf auth login`"
        ) from None
    return read_config(Path(file))


def read_config(path: Path) -> PretrainedConfig:
    """The transformers configuration in a folder, or in a file.

    Raises:
        SourceError: if there is none, transformers does not know the architecture, or the model is quantized already.
    """
    from transformers import AutoConfig

    file = path if path.is_file() else path / "config.json"
    values = read_json(file) if file.exists() else None
    if values is None:
        raise SourceError(
            f"{path} has no config.json, expected a transformers checkpoint; fetch config.json or choose another folder"
        )
    if values.get("quantization_config"):
        settings = values["quantization_config"]
        method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings
        raise SourceError(
            f"{path} is quantized already (quant_method {method!r}), expected a full-precision model; start from its source"
        )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise SourceError(
            f"transformers cannot read {file} ({first_line(error)}); expected an architecture and settings "
            f"of the installed version, update transformers or choose another model"
        ) from None


def as_bytes(tensor: Tensor) -> Any:
    """A contiguous CPU tensor's memory as a flat uint8 array, shared."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def sha256_file(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with read_errors(path), open(path, "rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
