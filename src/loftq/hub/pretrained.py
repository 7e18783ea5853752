"""Weights for transformers and PEFT, from safetensors alone: pickled ones run code when they are opened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loftq.checkpoint.source import INDEX, SINGLE, without_safetensors, without_safetensors_on_hub
from loftq.hub.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS

_NO_CONVERSION = "DISABLE_SAFETENSORS_CONVERSION"


def load_pretrained(cls: Any, model: str | Path, *, revision: str | None = None, **options: Any) -> Any:
    """``from_pretrained`` of one of transformers' classes, with no remote code.

    Args:
        model: a folder, or a hub id. revision: of a hub id; ``None`` for its main branch.
        options: for ``from_pretrained``.

    Raises:
        SourceError: the weights are not there as safetensors.
        Exception: whatever else transformers raises.
    """
    fixed = {"use_safetensors": True, "trust_remote_code": False}
    if os.path.isdir(model):
        check_safetensors(model)
        return cls.from_pretrained(model, **{**options, **fixed})
    try:
        with _as_published():
            return cls.from_pretrained(model, **{**options, **fixed, "revision": revision or "main"})
    except OSError as error:
        if f"does not appear to have a file named {SINGLE}" not in str(error):
            raise
        raise without_safetensors_on_hub(str(model), revision) from None


def check_safetensors(folder: str | Path) -> None:
    """Refuse a model's folder whose weights, or whose adapter's, are not there as safetensors.

    Raises:
        SourceError: they are pickled, or missing.
    """
    folder = Path(folder)
    if (folder / ADAPTER_CONFIG).exists():  # transformers puts an adapter on that stands beside the model
        check_adapter_file(folder)
        if not (folder / "config.json").exists():
            return  # an adapter alone, on the model that it names
    if not any((folder / name).exists() for name in (SINGLE, INDEX)):
        raise without_safetensors(folder, SINGLE)


def check_adapter_file(folder: str | Path) -> None:
    """Refuse an adapter's folder without :data:`ADAPTER_WEIGHTS`, for which PEFT would take a pickled file or ask the hub.

    Raises:
        SourceError: the file is missing.
    """
    if not (Path(folder) / ADAPTER_WEIGHTS).exists():
        raise without_safetensors(Path(folder), ADAPTER_WEIGHTS)


@contextmanager
def _as_published() -> Iterator[None]:
    """Keep transformers from taking another revision, made by a program, where the one asked for has no safetensors."""
    before = os.environ.get(_NO_CONVERSION)
    os.environ[_NO_CONVERSION] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_CONVERSION]
        else:
            os.environ[_NO_CONVERSION] = before
