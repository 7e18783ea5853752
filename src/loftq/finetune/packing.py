"""Whether a model keeps the texts of a packed window apart."""

from __future__ import annotations

from typing import Any

import torch

from loftq.errors import ConfigError
from loftq.evaluate.models import eval_mode

_LENGTH = 8  # tokens of each of the two texts


@torch.no_grad()
def check_isolated(model: Any) -> None:
    """Two texts in one window, told apart by positions that begin again at 0: the second must not see the first.

    An architecture that takes no positions ignores them without a word, and each text would be trained behind those that
    happen to stand before it.

    Raises:
        ConfigError: the second text's logits change with the first text.
    """
    config = model.config.get_text_config()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    # two windows in turn, not as a batch: nothing but the first text may differ
    first, second, other = torch.randint(config.vocab_size, (3, 1, _LENGTH), generator=generator).to(device)
    positions = torch.arange(_LENGTH, device=device).repeat(2)[None]
    with eval_mode(model):
        found = [
            model(input_ids=torch.cat([text, second], 1), position_ids=positions, use_cache=False)
            .logits[:, _LENGTH:]
            .float()
            for text in (first, other)
        ]
    exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
    allowed = (1e-4 if exact else 2e-2) * float(found[0].abs().max())
    if float((found[0] - found[1]).abs().max()) > allowed:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        raise ConfigError(
            f"packing is on, but {type(base).__name__} does not keep the texts of a window apart; turn packing off"
        )
