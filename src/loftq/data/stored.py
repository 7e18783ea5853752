"""Running text that is token ids already, as ``FILE.safetensors:KEY``: for models without a tokenizer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from loftq.data.examples import Example, Examples
from loftq.errors import ConfigError, SourceError


def stored_examples(ids: Tensor, where: str, max_length: int, config: Any | None = None) -> Examples:
    """Windows of ``max_length`` tokens, every one of which is predicted from those before it; the last may be shorter.

    Args:
        ids: (n,) integer token ids, or of another shape, whose rows follow one another. where: their name.
        config: of the model, for the size of its vocabulary.

    Raises:
        ConfigError: an id that the model does not know. SourceError: fewer than two ids.
    """
    stream = ids.flatten().numpy().astype("int32")
    if len(stream) < 2:
        raise SourceError(f"{where} has {len(stream)} token ids, expected at least 2")
    known = None if config is None else config.get_text_config().vocab_size
    if int(stream.min()) < 0 or (known is not None and int(stream.max()) >= known):
        expected = "none below 0" if known is None else f"ids from 0 to {known - 1}, those of the model's vocabulary"
        raise ConfigError(f"{where} has the ids {int(stream.min())} to {int(stream.max())}, expected {expected}")
    found = Examples("causal", max_length, rows=1)
    for begin in range(0, len(stream) - 1, max_length):
        window = stream[begin : begin + max_length]
        found.items.append(Example(window, window, f"{where}, token {begin}"))
    return found
