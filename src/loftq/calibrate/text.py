"""Text to calibrate on, as windows of token ids."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loftq.config import positive_int
from loftq.data.hub import could_be_hub_name, hub_rows
from loftq.errors import ConfigError, LoftQWarning, SourceError, counted, first_line
from loftq.evaluate.text import BUILTIN, builtin_text, read_text

SELF = "self"

# Evaluation scores what lies beyond 60 % of the built-in text; the gap keeps a paragraph from being in both.
_BUILTIN_SHARE = 0.55
# LLM-QAT, section 3.1: the first tokens are the likeliest ones, the others are sampled.
_LIKELIEST = 3
_GENERATED_ROWS = 16


@dataclass(frozen=True)
class CalibrationTokens:
    """Windows of token ids.

    Attributes:
        ids: (n, length) int64.
        mask: (n, length) bool, false for padding, which is at the end of a window.
        name: where they are from.
        sha256: of ids and mask.
    """

    ids: Tensor
    mask: Tensor
    name: str
    sha256: str

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor | None = None, name: str = "token ids") -> CalibrationTokens:
        """Check the windows and compute their hash; without a mask nothing is padding.

        Raises:
            SourceError: no window has 2 tokens.
        """
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        ids, mask = ids.long().contiguous(), mask.bool().contiguous()
        kept = mask.sum(1) >= 2
        if not kept.any():
            raise SourceError(
                f"calibration text {name!r} has no window of at least 2 tokens that are not padding; give a longer text"
            )
        ids, mask = ids[kept], mask[kept]
        digest = hashlib.sha256(json.dumps(list(ids.shape)).encode())
        digest.update(ids.numpy().tobytes())
        digest.update(mask.numpy().tobytes())
        return cls(ids, mask, name, digest.hexdigest())

    def parted(self, windows: int) -> tuple[CalibrationTokens, CalibrationTokens | None]:
        """That many of the windows, spread evenly, and the others; ``None`` if there are none."""
        count = self.ids.shape[0]
        chosen = torch.zeros(count, dtype=torch.bool)
        chosen[_spread(count, windows)] = True
        parts = [
            CalibrationTokens.of(self.ids[kept], self.mask[kept], self.name) for kept in (chosen, ~chosen) if kept.any()
        ]
        return parts[0], parts[1] if len(parts) > 1 else None


def calibration_tokens(
    name: str,
    tokenizer: Any,
    *,
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    model: nn.Module | None = None,
) -> CalibrationTokens:
    """Windows of ``length`` tokens to calibrate on.

    Args:
        name: ``pydoc`` (English that every Python carries; the part that is not used for evaluation), a UTF-8 text file,
            a ``.jsonl`` file (one object a line, with ``text``, ``prompt`` and ``completion``, or ``messages``; one
            padded window each), ``FILE.safetensors:KEY`` (token ids), ``self`` (text that ``model`` generates, as
            LLM-QAT, arXiv:2305.17888, does), or a data set of the hub, ``id`` or ``id:split``, with a column ``text``.
        tokenizer: a transformers tokenizer; not needed for token ids.
        samples: windows wanted, spread evenly over the text. Where there are fewer, a warning says so.
        length: tokens of a window.
        seed: of the generated text.
        model: a causal language model, for ``self``.

    Raises:
        SourceError: no such text, a damaged file, or not one window of 2 tokens.
        ConfigError: an option out of range, ``self`` without a model, or a data set without the ``datasets`` package.
    """
    positive_int("samples", samples)
    positive_int("length", length, 2)
    positive_int("seed", seed, 0)
    if name == SELF:
        return CalibrationTokens.of(*_generated(model, tokenizer, samples, length, seed), name)
    path, _, key = name.rpartition(":")
    if path.endswith(".safetensors"):
        return _windows(_stored_ids(Path(os.path.expanduser(path)), key), samples, length, name)
    if tokenizer is None:
        raise ConfigError(f"calibration text {name!r} needs a tokenizer; put the tokenizer's files beside the model")
    if name.endswith(".jsonl"):
        return _rows(Path(os.path.expanduser(name)), tokenizer, samples, length)
    if name == BUILTIN:
        text = builtin_text()
        text = text[: int(len(text) * _BUILTIN_SHARE)]
    elif os.path.isfile(os.path.expanduser(name)) or not could_be_hub_name(name):
        text = read_text(name)
    else:
        text = _dataset_text(name, samples * length)
    return _windows(_encode(tokenizer, text), samples, length, name)


def _encode(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, verbose=False).input_ids, dtype=torch.long)


def _warn_if_fewer(name: str, got: int, wanted: int, length: int) -> None:
    if got < wanted:
        warnings.warn(
            f"calibration text {name!r} gave {counted(got, 'window')} of {length} tokens, {wanted} were wanted; all of it is "
            f"used",
            LoftQWarning,
            stacklevel=4,
        )


def _spread(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` of ``count`` positions, evenly from the first to the last."""
    if count <= wanted:
        return list(range(count))
    return [i * (count - 1) // max(1, wanted - 1) for i in range(wanted)]


def _windows(ids: Tensor, samples: int, length: int, name: str) -> CalibrationTokens:
    """Consecutive full windows; a text shorter than one window is one."""
    if ids.numel() < length:
        length = max(1, ids.numel())
    count = ids.numel() // length
    kept = ids[: count * length].view(count, length)[_spread(count, samples)]
    result = CalibrationTokens.of(kept, torch.ones_like(kept, dtype=torch.bool), name)
    _warn_if_fewer(name, len(kept), samples, length)
    return result


def _stored_ids(path: Path, key: str) -> Tensor:
    from loftq.checkpoint.source import SafetensorsSource

    if not path.is_file():
        raise SourceError(f"{path} does not exist, expected a safetensors file with token ids")
    source = SafetensorsSource(path.parent, single=path.name)
    info = source.tensors.get(key)
    if info is None:
        raise SourceError(f"{path} has no tensor {key!r}, expected one of {', '.join(source.tensors)}")
    if info.dtype not in (torch.int16, torch.int32, torch.int64) or len(info.shape) != 1:
        raise SourceError(
            f"{key} in {path} is {info.dtype} of shape {info.shape}, expected token ids (n,) as int16, int32 or int64"
        )
    ids = source.read(key).long()
    if ids.numel() and int(ids.min()) < 0:
        raise SourceError(f"{key} in {path} has the token id {int(ids.min())}, expected none below 0")
    return ids


def _rows(path: Path, tokenizer: Any, samples: int, length: int) -> CalibrationTokens:
    """One window a line, padded at the end."""
    if not os.path.isfile(path):
        raise SourceError(f"{path} does not exist, expected a file with one JSON object a line")
    windows: list[Tensor] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 at byte {error.start}; convert it first") from None
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror or error}); check its permissions") from None
    numbers = [i for i, line in enumerate(lines, 1) if line.strip()]
    for position in _spread(len(numbers), samples):
        number = numbers[position]
        ids = _row_ids(lines[number - 1], tokenizer, f"{path}, line {number}")[:length]
        if ids.numel() >= 2:
            windows.append(ids)
    width = max((w.numel() for w in windows), default=1)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.full((max(1, len(windows)), width), pad, dtype=torch.long)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, window in enumerate(windows):
        ids[row, : window.numel()] = window
        mask[row, : window.numel()] = True
    result = CalibrationTokens.of(ids, mask, str(path))
    _warn_if_fewer(str(path), len(windows), samples, width)
    return result


def _row_ids(line: str, tokenizer: Any, where: str) -> Tensor:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise SourceError(f"{where} is no JSON ({error}); repair or remove it") from None
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return _encode(tokenizer, row["text"])
        if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
            return _encode(tokenizer, row["prompt"] + row["completion"])
        if isinstance(row.get("messages"), list):
            return _encode_chat(tokenizer, row["messages"], where)
    raise SourceError(
        f"{where} has {_description(row)}, expected an object with text, messages, or prompt and completion"
    )


def _description(row: Any) -> str:
    return f"the keys {', '.join(map(str, row))}" if isinstance(row, dict) else f"a {type(row).__name__}"


def _encode_chat(tokenizer: Any, messages: list[Any], where: str) -> Tensor:
    if getattr(tokenizer, "chat_template", None) is None:
        try:  # without a template, the plain contents
            return _encode(tokenizer, "\n".join(message["content"] for message in messages))
        except (TypeError, KeyError):
            raise SourceError(f"{where} has messages without role and content; repair or remove it") from None
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.long)
    except Exception as error:
        raise SourceError(
            f"{where} has messages that the chat template refuses ({first_line(error)}); repair or remove it"
        ) from None


def _dataset_text(name: str, tokens: int) -> str:
    """Enough rows of a data set for ``tokens`` tokens, at 8 characters each."""
    identifier, _, split = name.partition(":")
    texts, size = [], 0
    for row in hub_rows(identifier, split or "train", what=f"calibration text {name!r}", install="datasets"):
        if not isinstance(row.get("text"), str):
            raise SourceError(f"data set {name} has the columns {', '.join(row)}, expected one named text")
        texts.append(row["text"])
        size += len(row["text"])
        if size > 8 * tokens:
            break
    return "\n\n".join(texts)


@torch.no_grad()
def _generated(
    model: Any, tokenizer: Any, samples: int, length: int, seed: int
) -> tuple[Tensor, Tensor]:  # LLM-QAT, section 3.1
    if model is None:
        raise ConfigError(f"calibration text {SELF!r} is generated by the model, but none was given; name a text")
    config = model.config.get_text_config()
    start = getattr(tokenizer, "bos_token_id", None)
    start = config.bos_token_id if start is None else start
    end = getattr(tokenizer, "eos_token_id", None)
    end = config.eos_token_id if end is None else end
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    generator = torch.Generator().manual_seed(seed)
    windows = []
    for first in range(0, samples, _GENERATED_ROWS):
        rows = min(_GENERATED_ROWS, samples - first)
        if start is None:  # no token marks a beginning: any may stand there
            ids = torch.randint(config.vocab_size, (rows, 1), generator=generator)
        else:
            ids = torch.full((rows, 1), int(start))
        windows.append(_sample(model, ids, length, generator))
    ids = torch.cat(windows)
    # what follows the end of a text is another text to the model only behind a beginning, which is not sampled
    ended = torch.isin(ids, torch.tensor(ends or [-1]))
    ended[:, 0] = False
    mask = ended.long().cumsum(1) - ended.long() == 0
    return ids, mask


def _sample(model: Any, ids: Tensor, length: int, generator: torch.Generator) -> Tensor:
    device = next(model.parameters()).device
    cache, step = None, ids.to(device)
    while ids.shape[1] < length:
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1].float().cpu()
        # the very first choices differ between rows, or all rows would begin alike
        likely = ids.shape[1] <= _LIKELIEST
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        chosen = logits.argmax(-1, keepdim=True) if likely and ids.shape[1] > 1 else drawn
        ids = torch.cat([ids, chosen], 1)
        step = chosen.to(device)
    return ids
