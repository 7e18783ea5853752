"""Token ids to measure on: a text file, the built-in English, or ids that are stored already."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from loftq.checkpoint.source import SafetensorsSource, sha256_file
from loftq.errors import ConfigError, SourceError
from loftq.evaluate.models import encode, load_tokenizer
from loftq.evaluate.text import BUILTIN, read_text

_SEPARATOR = ".safetensors:"
# Share of the built-in text before the measured part begins; what lies before it is free for calibration.
BUILTIN_BEGINS = 0.6


def text_tokens(name: str, model: str, max_tokens: int | None = None) -> Tensor:
    """(n,) int64 token ids.

    Args:
        name: a UTF-8 text file; ``pydoc`` for the last two fifths of the English that every Python has; or
            ``FILE.safetensors:KEY`` for stored ids, which need no tokenizer.
        model: the folder or hub id whose tokenizer is used.
        max_tokens: use the first tokens only.

    Raises:
        SourceError: there is no such text, tensor or tokenizer. ConfigError: for fewer than 2 tokens asked for.
    """
    if max_tokens is not None and max_tokens < 2:
        raise ConfigError(f"max_tokens is {max_tokens}, expected at least 2")
    stored = stored_tokens(name)
    if stored is not None:
        return stored.flatten().long()[:max_tokens]
    text = read_text(name)
    if name == BUILTIN:
        text = text[int(len(text) * BUILTIN_BEGINS) :]
    return encode(load_tokenizer(model), text, max_tokens)


def is_stored(name: str) -> bool:
    """Whether a name means stored ids, ``FILE.safetensors:KEY``."""
    return _SEPARATOR in name


def stored_tokens(name: str) -> Tensor | None:
    """The tensor that ``FILE.safetensors:KEY`` names, or ``None`` for a name of another kind.

    Raises:
        SourceError: there is no such file or tensor, or it holds no integers.
    """
    stem, separator, key = name.rpartition(_SEPARATOR)
    if not separator:
        return None
    path = Path(os.path.expanduser(stem + ".safetensors"))
    if not path.is_file():
        raise SourceError(f"{path} does not exist, expected a safetensors file with token ids")
    file = SafetensorsSource(path.parent, single=path.name)
    if key not in file.tensors:
        raise SourceError(f"{path} has no tensor {key!r}, expected one of {', '.join(file.tensors)}")
    ids = file.read(key)
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise SourceError(f"{path} holds {key} as {ids.dtype}, expected integer token ids")
    return ids


def check_apart(calibration: str, text: str) -> None:
    """A :class:`ConfigError` if a model would be measured on the text it was calibrated on.

    The built-in text may serve for both, since calibration takes its first part.
    """
    if text == BUILTIN or calibration == BUILTIN:
        return
    (file, key), (other, other_key) = _place(calibration), _place(text)
    if file == other and key == other_key:
        raise ConfigError(
            f"calibration and measurement both use {text}, expected two texts: on its own calibration text a method looks "
            f"better than it is"
        )


def text_digest(name: str | None) -> str | None:
    """sha256 of the file that a text is read from; ``None`` for a text that is no file here."""
    if name is None:
        return None
    path = _place(name)[0]
    return sha256_file(path) if path.is_file() else None


def _place(name: str) -> tuple[Path, str]:
    stem, separator, key = name.rpartition(_SEPARATOR)
    path = Path(os.path.expanduser(stem + ".safetensors" if separator else name)).resolve()
    return path, key if separator else ""
