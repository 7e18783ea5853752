"""What the logits of a text depend on, found out by changing other tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loftq.evaluate.models import eval_mode

LENGTH = 8  # tokens of a probing text


def probing_texts(model: Any, count: int) -> Tensor:
    """(count, 1, 8) int64 token ids on the model's device, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (count, 1, LENGTH), generator=generator)
    return ids.to(next(model.parameters()).device)


@torch.no_grad()
def differ(model: Any, texts: tuple[Tensor, Tensor], scored: slice, *, rounding: float = 2e-2, **inputs: Any) -> bool:
    """Whether two texts have different logits at ``scored``, beyond what rounding explains.

    Args:
        model: returns ``logits`` (1, tokens, vocabulary); set to eval mode for the duration.
        texts: (1, tokens) ids each, run in turn, not as a batch: nothing but the tokens may differ. inputs: for both.
        rounding: what it explains in half precision, as a share of the largest logit; in float32 it is 1e-4.
    """
    with eval_mode(model):
        found = [model(input_ids=ids, **inputs).logits[:, scored].float() for ids in texts]
    exact = all(p.dtype in (torch.float32, torch.float64) for p in model.parameters() if p.is_floating_point())
    allowed = (1e-4 if exact else rounding) * float(found[0].abs().max())
    return float((found[0] - found[1]).abs().max()) > allowed


def sees_ahead(model: Any) -> bool:
    """Whether a token's logits depend on the tokens behind it, as an encoder's do."""
    text, end, other = probing_texts(model, 3)
    # of many experts each sees as many rows as later tokens leave it, and sums of another number are rounded otherwise
    return differ(model, (torch.cat([text, end], 1), torch.cat([text, other], 1)), slice(LENGTH), rounding=0.1)
