"""Whether a model keeps the texts of a packed window apart."""

from __future__ import annotations

from typing import Any

import torch

from loftq.errors import ConfigError
from loftq.evaluate.attention import LENGTH, differ, probing_texts


def check_isolated(model: Any) -> None:
    """Two texts in one window, told apart by positions that begin again at 0: the second must not see the first.

    An architecture that takes no positions ignores them without a word, and each text would be trained behind those that
    happen to stand before it.

    Raises:
        ConfigError: the second text's logits change with the first text.
    """
    first, second, other = probing_texts(model, 3)
    windows = (torch.cat([first, second], 1), torch.cat([other, second], 1))
    positions = torch.arange(LENGTH, device=first.device).repeat(2)[None]
    if differ(model, windows, slice(LENGTH, None), position_ids=positions, use_cache=False):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        raise ConfigError(
            f"packing is on, but {type(base).__name__} does not keep the texts of a window apart; turn packing off"
        )
