"""The calibration text as arguments of a model's ``forward``."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loftq.calibrate.text import CalibrationTokens
from loftq.errors import ConfigError, SourceError


@dataclass(frozen=True)
class Batch:
    """Some windows.

    Attributes:
        inputs: keyword arguments of ``forward``.
        mask: (rows, tokens) bool, true for a token; the decoder's in an encoder-decoder model.
        encoder_mask: the encoder's, where there is one beside the decoder.
        encoder: names under which the encoder's modules are.
    """

    inputs: dict[str, Any]
    mask: Tensor
    encoder_mask: Tensor | None = None
    encoder: tuple[str, ...] = field(default=())

    @property
    def rows(self) -> int:
        return self.mask.shape[0]

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return int(self.mask.sum()) + (0 if self.encoder_mask is None else int(self.encoder_mask.sum()))

    def masks_for(self, block: str) -> tuple[Tensor | None, Tensor]:
        """(the mask of what the block may read besides, or ``None``; the mask of its own hidden states)."""
        if self.encoder_mask is not None and block.startswith(self.encoder):
            return None, self.encoder_mask
        return self.encoder_mask, self.mask


def make_batches(model: Any, tokens: CalibrationTokens, batch_tokens: int) -> list[Batch]:
    """Cut the windows into batches of at most ``batch_tokens`` tokens (or one window), without columns of padding only.

    An encoder reads the first half of every window and the decoder the second.

    Raises:
        SourceError: the model takes no token ids, or fewer different ones.
        ConfigError: the windows are longer than the model's positions.
    """
    parameters = inspect.signature(model.forward).parameters
    if "input_ids" not in parameters:
        raise SourceError(f"{type(model).__name__} takes no input_ids, expected a model that reads text")
    paired = bool(getattr(model.config, "is_encoder_decoder", False)) and "decoder_input_ids" in parameters
    _check(model, tokens, paired)
    rows = max(1, batch_tokens // tokens.ids.shape[1])
    return [
        _batch(model, ids, mask, paired, parameters)
        for ids, mask in zip(tokens.ids.split(rows), tokens.mask.split(rows), strict=True)
    ]


def _check(model: Any, tokens: CalibrationTokens, paired: bool) -> None:
    text_config = model.config.get_text_config()
    length = tokens.ids.shape[1]
    limit = getattr(text_config, "max_position_embeddings", None)
    needed = -(-length // 2) if paired else length
    if isinstance(limit, int) and 0 < limit < needed:
        raise ConfigError(
            f"the calibration windows have {length} tokens, but the model has {limit} positions; choose a length of at "
            f"most {2 * limit if paired else limit}"
        )
    vocabulary = getattr(text_config, "vocab_size", None)
    largest = int(tokens.ids.max())
    if isinstance(vocabulary, int) and not 0 <= largest < vocabulary:
        raise SourceError(
            f"the calibration text has the token id {largest}, but the model knows {vocabulary}; use the tokenizer that "
            f"belongs to the model"
        )


def _batch(model: Any, ids: Tensor, mask: Tensor, paired: bool, parameters: Any) -> Batch:
    if not paired:
        ids, mask = _trim(ids, mask)
        return Batch(_arguments(ids, mask, "", parameters), mask)
    lengths = mask.sum(1)
    half = lengths // 2
    position = torch.arange(ids.shape[1])
    decoder_length = int((lengths - half).max())
    encoder_mask = position[: max(1, int(half.max()))] < half[:, None]
    decoder_mask = position[:decoder_length] < (lengths - half)[:, None]
    source = torch.arange(decoder_length) + half[:, None]
    decoder_ids = ids.gather(1, source.clamp(max=ids.shape[1] - 1)) * decoder_mask
    encoder_ids = ids[:, : encoder_mask.shape[1]] * encoder_mask
    inputs = _arguments(encoder_ids, encoder_mask, "", parameters)
    inputs.update(_arguments(decoder_ids, decoder_mask, "decoder_", parameters))
    stack = model.get_encoder()
    names = tuple(f"{n}." for n, m in model.named_modules() if m is stack and n)
    return Batch(inputs, decoder_mask, encoder_mask, names)


def _trim(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Without the columns at the end that are padding in every row; copies, which nothing else shares."""
    length = int(mask.any(0).nonzero().max()) + 1
    return ids[:, :length].clone(), mask[:, :length].clone()


def _arguments(ids: Tensor, mask: Tensor, prefix: str, parameters: Any) -> dict[str, Tensor]:
    arguments = {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask.long()}
    return {name: value for name, value in arguments.items() if name in parameters or name == "input_ids"}
