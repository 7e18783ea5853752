"""Perplexity of a causal language model, with its standard error.

    ppl = exp(mean of -log p(token | the tokens before it in its window))

Windows of ``window`` tokens advance by ``stride``; with ``stride < window`` a token is scored once, with at least
``window - stride`` tokens of context. The standard error is that of the mean over tokens, carried through exp:
``ppl * std(nll) / sqrt(n)``. Neighbouring tokens are correlated, so it is a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loftq.config import positive_int
from loftq.errors import ConfigError, SourceError
from loftq.evaluate.head import chunks, losses, parts_of
from loftq.evaluate.models import eval_mode


@dataclass(frozen=True)
class Perplexity:
    """``perplexity`` ± ``standard_error`` over ``tokens`` scored tokens; ``nll`` is the mean in nats."""

    perplexity: float
    standard_error: float
    nll: float
    tokens: int
    window: int
    stride: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def perplexity(
    model: nn.Module,
    ids: Tensor,
    *,
    window: int = 1024,
    stride: int | None = None,
    batch_size: int = 1,
    advance: Callable[[str, int], None] = lambda what, tokens: None,
) -> Perplexity:
    """Score token ids with a causal language model.

    Args:
        model: returns ``logits`` (batch, tokens, vocabulary); set to eval mode for the duration. Where its last hidden
            states and its head give the same, the logits exist a few hundred tokens at a time only.
        ids: (n,) token ids.
        window: tokens the model sees at once.
        stride: how far the window advances; by default the window, so that windows do not overlap.
        batch_size: full windows scored together.
        advance: called with the number of tokens scored.

    Raises:
        ConfigError: for a window below 2 or beyond the model's positions, or a stride beyond the window.
        SourceError: for fewer than 2 tokens.
    """
    stride = window if stride is None else stride
    ids = checked_ids(model, ids, window)
    positive_int("stride", stride)
    positive_int("batch_size", batch_size)
    if stride > window:
        raise ConfigError(f"stride is {stride}, expected at most the window of {window}, or tokens would be left out")

    device = next(p.device for p in model.parameters())
    found: list[Tensor] = []
    with eval_mode(model):
        parts = parts_of(model, ids[:window])
        for batch, fresh in windows(ids, window, stride, batch_size):
            hidden = parts.body(batch[:, :-1].to(device))[:, -fresh:].flatten(0, 1)
            targets = batch[:, -fresh:].to(device).flatten()
            for chunk in chunks(targets.numel()):
                found.append(losses(parts.head.logits(hidden[chunk]), targets[chunk]))
                advance("tokens", found[-1].numel())
    nll = torch.cat(found)
    mean, error = mean_and_error(nll)
    return Perplexity(*perplexity_of(mean, error), mean, nll.numel(), window, stride)


def checked_ids(model: nn.Module, ids: Tensor, window: int) -> Tensor:
    """(n,) int64 ids to score, after checking that there are enough of them and that the window fits the model."""
    check_window(getattr(model, "config", None), window)
    ids = ids.flatten().long()
    if ids.numel() < 2:
        raise SourceError(f"the text has {ids.numel()} tokens, expected at least 2 to predict one from another")
    return ids


def check_window(config: Any, window: int) -> None:
    """A :class:`ConfigError` for a window that is too short, or longer than the model of this config."""
    positive_int("window", window, 2)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and window > limit:
        raise ConfigError(
            f"window is {window}, but the model has {limit} positions; choose a window of at most {limit}"
        )


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of (n,) values, and its standard error std / sqrt(n); 0 for a single value."""
    deviation = float(values.std()) if values.numel() > 1 else 0.0
    return float(values.mean()), deviation / math.sqrt(values.numel())


def perplexity_of(nll: float, error: float) -> tuple[float, float]:
    """exp of a mean loss in nats, and the standard error carried through exp; beyond float64 it is a broken model, no crash."""
    value = math.exp(nll) if nll < 700 else math.inf
    return value, value * error


def windows(ids: Tensor, window: int, stride: int, batch_size: int) -> list[tuple[Tensor, int]]:
    """Batches of (rows, inputs + 1) token ids, and how many of a row's last tokens have not been scored before.

    A window's last input predicts the token after it, where the next window begins: every token but the first of the
    text is scored exactly once.
    """
    batches: list[tuple[Tensor, int]] = []
    pending: list[Tensor] = []
    pending_fresh = 0
    scored = 1
    for start in range(0, ids.numel() - 1, stride):
        stop = min(start + window + 1, ids.numel())
        piece, fresh = ids[start:stop], stop - scored
        if fresh <= 0:
            break
        if pending and (len(pending) == batch_size or (piece.numel(), fresh) != (pending[0].numel(), pending_fresh)):
            batches.append((torch.stack(pending), pending_fresh))
            pending = []
        pending.append(piece)
        pending_fresh, scored = fresh, stop
    batches.append((torch.stack(pending), pending_fresh))
    return batches
