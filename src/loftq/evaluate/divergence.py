"""How far a quantized model's predictions are from the full-precision model's, beside its perplexity, in one pass.

    KL = mean over tokens of Σ_v p(v) ln(p(v) / q(v))        in nats; p: full precision, q: quantized

Perplexity asks for the one token that came next, KL for the whole distribution: it is 0 only if nothing changed, and on
the same text its relative standard error is far smaller. Both use the windows of :func:`loftq.evaluate.perplexity`.
Standard errors are std / sqrt(n) over tokens (perplexity's is carried through exp); neighbouring tokens are correlated,
so they are lower bounds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loftq.errors import ConfigError
from loftq.evaluate.head import Head, chunks, losses, losses_and_divergence, parts_of
from loftq.evaluate.models import eval_mode
from loftq.evaluate.perplexity import checked_ids, mean_and_error, perplexity_of, windows

Advance = Callable[[str, int], None]


def _silent(what: str, tokens: int) -> None:
    pass


@dataclass(frozen=True)
class Score:
    """``perplexity`` ± ``perplexity_se``, ``kl`` ± ``kl_se`` in nats over ``tokens`` tokens; ``nll`` in nats."""

    perplexity: float
    perplexity_se: float
    nll: float
    kl: float
    kl_se: float
    tokens: int

    @classmethod
    def of(cls, nll: Tensor, kl: Tensor) -> Score:
        """From (n,) losses and divergences."""
        mean, error = mean_and_error(nll)
        return cls(*perplexity_of(mean, error), mean, *mean_and_error(kl), nll.numel())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Reference:
    """What the full-precision model says of a text, small enough to keep while many quantized models are scored.

    Attributes:
        ids: (n + 1,) token ids. window: tokens a model sees at once.
        head: the full-precision model's output head.
        states: (n, d) float32 last hidden states, from which ``head`` gives the logits; or, where a model's logits are
            not its head of its last hidden states, (n, vocabulary) float16 log-probabilities in a file.
        score: the full-precision model's own.
    """

    ids: Tensor
    window: int
    head: Head
    states: Tensor
    score: Score

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        model: nn.Module,
        ids: Tensor,
        window: int = 1024,
        *,
        folder: Path | None = None,
        advance: Advance = _silent,
    ) -> Reference:
        """Run the full-precision model over a text once.

        Args:
            model: causal language model; set to eval mode for the duration. Only its output head is kept.
            ids: (n + 1,) token ids. window: as for :func:`loftq.evaluate.perplexity.perplexity`.
            folder: for the file of log-probabilities, where one is needed; by default the system's temporary folder.
            advance: called with the number of tokens scored.

        Raises:
            ConfigError, SourceError: as :func:`loftq.evaluate.perplexity.perplexity`.
        """
        ids = checked_ids(model, ids, window)
        device = next(p.device for p in model.parameters())
        states: Tensor | None = None
        found: list[Tensor] = []
        with eval_mode(model):
            parts = parts_of(model, ids[:window])
            done = 0
            for batch, fresh in windows(ids, window, window, 1):
                hidden = parts.body(batch[:, :-1].to(device))[0]
                targets = batch[0, 1:].to(device)
                if states is None:
                    states = _store(ids.numel() - 1, hidden.shape[-1], parts.split, folder)
                for chunk in chunks(fresh):
                    logits = parts.head.logits(hidden[chunk])
                    found.append(losses(logits, targets[chunk]))
                    kept = hidden[chunk] if parts.split else torch.log_softmax(logits, -1).clamp_min_(-65504)
                    states[done : done + kept.shape[0]] = kept.to("cpu", states.dtype)
                    done += kept.shape[0]
                    advance("tokens", kept.shape[0])
        assert states is not None
        nll = torch.cat(found)
        return cls(ids, window, parts.head, states, Score.of(nll, torch.zeros_like(nll)))


def _store(tokens: int, width: int, split: bool, folder: Path | None) -> Tensor:
    if split:
        return torch.empty(tokens, width)
    # a log-probability, unlike a logit, is near 0 where the probability is large: float16's relative error of 2^-11 then
    # moves KL by about 1e-4 of itself
    with tempfile.TemporaryFile(dir=folder) as file:  # the map keeps the file until it is closed itself
        return torch.from_numpy(np.memmap(file, np.float16, "w+", shape=(tokens, width)))


@torch.no_grad()
def score(model: nn.Module, reference: Reference, *, advance: Advance = _silent) -> Score:
    """Perplexity of a quantized model and its divergence from the full-precision one, on the reference's text.

    Args:
        model: causal language model with the vocabulary of the reference's; set to eval mode for the duration.
        advance: called with the number of tokens scored.

    Raises:
        ConfigError: for a window beyond the model's positions, or another vocabulary.
    """
    ids = checked_ids(model, reference.ids, reference.window)
    device = next(p.device for p in model.parameters())
    nll: list[Tensor] = []
    kl: list[Tensor] = []
    with eval_mode(model):
        parts = parts_of(model, ids[: reference.window])
        done = 0
        for batch, fresh in windows(ids, reference.window, reference.window, 1):
            hidden = parts.body(batch[:, :-1].to(device))[0]
            targets = batch[0, 1:].to(device)
            for chunk in chunks(fresh):
                logits = parts.head.logits(hidden[chunk])
                known = reference.head.logits(reference.states[done : done + logits.shape[0]].to(device))
                if known.shape != logits.shape:
                    raise ConfigError(
                        f"the model predicts {logits.shape[1]} tokens, expected the reference's {known.shape[1]}; compare a "
                        f"model with its own source"
                    )
                loss, divergence = losses_and_divergence(known, logits, targets[chunk])
                nll.append(loss)
                kl.append(divergence)
                done += logits.shape[0]
                advance("tokens", logits.shape[0])
    return Score.of(torch.cat(nll), torch.cat(kl))
