"""Batches: examples of different lengths as tensors of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loftq.data.examples import IGNORED, Example
from loftq.data.summaries import end_token
from loftq.errors import ConfigError


def padding_id(model: Any, tokenizer: Any) -> int:
    """The token that fills the places which the attention mask hides: the model's own, or the tokenizer's.

    A tokenizer may have got a padding token that the model has no embedding of. A decoder with a head for a class finds the
    last token of a text by its config's padding token, which is set where it has none.
    """
    config = model.config.get_text_config()
    own = (tokenizer.pad_token_id, tokenizer.eos_token_id) if tokenizer is not None else ()
    wanted = (config.pad_token_id, *own)
    found = next((i for i in wanted if isinstance(i, int) and 0 <= i < config.vocab_size), 0)
    config.pad_token_id = found
    return found


def writing_ids(model: Any, tokenizer: Any) -> None:
    """The tokens with which an encoder-decoder begins, fills and ends what it writes, where its config leaves them out.

    A model that ``EncoderDecoderModel`` puts together from two others has a config around theirs, and no such tokens in
    it: the tokenizer's are taken. What the model says itself comes first, and its decoder's half then says the same: T5Gemma
    makes its decoder's inputs with the tokens of that half's config, and a model is to begin in training as it begins to write.

    Raises:
        ConfigError: neither the model nor the tokenizer has a token to begin with.
    """
    config, generation = model.config, model.generation_config
    half = getattr(config, "decoder", None)
    half = half if hasattr(half, "model_type") else None
    wanted = (
        generation.decoder_start_token_id,
        getattr(config, "decoder_start_token_id", None),
        getattr(half, "bos_token_id", None),
        generation.bos_token_id,
        tokenizer.bos_token_id,
        tokenizer.cls_token_id,
    )
    start = next((i for i in wanted if i is not None), None)
    if start is None:
        raise ConfigError(
            "the model and its tokenizer name no token that a text of the decoder begins with; set decoder_start_token_id "
            "in the model's config.json"
        )
    config.decoder_start_token_id = generation.decoder_start_token_id = start
    if config.pad_token_id is None:
        config.pad_token_id = padding_id(model, tokenizer)
    if half is not None:
        half.bos_token_id = start
        if half.pad_token_id is None:
            half.pad_token_id = config.pad_token_id
    if generation.eos_token_id is None:
        generation.eos_token_id = end_token(tokenizer)[0]


class Collator:
    """Pads what belongs together to the longest of a batch.

    Args:
        task: whose labels they are. pad_token_id: what fills ``input_ids``; where the model has none, any id, which the
            attention mask hides.
        multiple_of: lengths are rounded up to it, which GPUs like. limit: but not beyond the model's positions.
        decoder_start: makes ``decoder_input_ids`` from labels; for encoder-decoders.
    """

    def __init__(
        self,
        task: str,
        pad_token_id: int | None,
        *,
        multiple_of: int = 1,
        limit: int | None = None,
        decoder_start: Any = None,
    ) -> None:
        self.task = task
        self.pad = 0 if pad_token_id is None else pad_token_id
        self.multiple_of = multiple_of
        self.limit = limit
        self.decoder_start = decoder_start

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """A batch for the model: ``input_ids`` (n, length), ``attention_mask`` and labels, int64."""
        batch: dict[str, Any] = {"input_ids": self._padded([e.input_ids for e in examples], self.pad)}
        extra = set().union(*(e.extra for e in examples))
        if "position_ids" in extra:
            # the padding of a window is one more example to the attention mask, which its positions decide alone
            batch["position_ids"] = self._padded([e.extra["position_ids"] for e in examples], 0)
            # with a cache, even an empty one, transformers takes all tokens of a window for one text
            batch["use_cache"] = False
        else:
            batch["attention_mask"] = self._padded([np.ones(len(e.input_ids), np.int32) for e in examples], 0)
        if "token_type_ids" in extra:
            batch["token_type_ids"] = self._padded([e.extra["token_type_ids"] for e in examples], 0)
        labels = [e.labels for e in examples]
        if self.task == "qa":
            batch["start_positions"], batch["end_positions"] = torch.tensor(labels).T.contiguous().unbind()
        elif isinstance(labels[0], np.ndarray):
            batch["labels"] = self._padded(labels, IGNORED)
            if self.decoder_start is not None:
                batch["decoder_input_ids"] = self.decoder_start(labels=batch["labels"])
        else:
            batch["labels"] = torch.tensor(labels, dtype=torch.float32 if self.task == "regression" else torch.long)
        return batch

    def _padded(self, arrays: Sequence[np.ndarray], value: int) -> Tensor:
        longest = max(len(a) for a in arrays)
        width = -(-longest // self.multiple_of) * self.multiple_of
        if self.limit is not None:  # no position for more
            width = max(longest, min(width, self.limit))
        result = torch.full((len(arrays), width), value, dtype=torch.long)
        for row, array in enumerate(arrays):
            result[row, : len(array)] = torch.from_numpy(np.asarray(array, np.int64))
        return result
