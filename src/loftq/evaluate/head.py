"""A causal language model in two parts, so that its logits never exist for more than a few hundred tokens at once.

    hidden = body(ids)                                   # (rows, tokens, d), what is worth keeping
    logits = softcap · tanh(scale · (hidden Wᵀ + b) / softcap)     # (n, vocabulary), a chunk at a time

The vocabulary is tens of times wider than the model: 16,384 tokens of SmolLM2 have 38 MB of hidden states and 3.2 GB of
logits. Whether the two parts are the model is checked on the text itself; where they are not, the body is the whole model
and its "hidden states" are the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loftq.kernels import compiles
from loftq.kernels.threads import for_rows

CHUNK = 256
"""Tokens whose logits exist at once: at a vocabulary of 50,000 they take 50 MB, and the product still runs at full speed."""

_PROBE = 64  # tokens on which the parts are compared with the whole
# float32 sums in another order; in half precision the model itself rounds its logits
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}


class Head:
    """From hidden states to logits. Keeps the projection alone, not the model it comes from.

    Args:
        projection: (n, d) -> (n, vocabulary); ``None`` where the hidden states are the logits.
        scale, softcap: see the module's formula; ``softcap`` may be absent.
    """

    def __init__(self, projection: nn.Module | None, scale: float = 1.0, softcap: float | None = None) -> None:
        self.projection = projection
        self.scale = scale
        self.softcap = softcap
        self._memory: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, d) -> (n, vocabulary) float32. On the CPU in memory that the next call uses again."""
        if self.projection is None:
            return hidden.float()
        logits = self._project(hidden)
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def _project(self, hidden: Tensor) -> Tensor:
        module: Any = self.projection
        if type(module) is not nn.Linear or module.weight.dtype != torch.float32 or hidden.device.type != "cpu":
            dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), hidden.dtype)
            return module(hidden.to(dtype)).float()
        # a fresh matrix of this size costs as much as the product: the system has to provide its pages
        rows = hidden.shape[0]
        if self._memory is None or self._memory.shape[0] < rows:
            self._memory = torch.empty(rows, module.weight.shape[0])
        logits = torch.mm(hidden.float(), module.weight.T, out=self._memory[:rows])
        return logits if module.bias is None else logits.add_(module.bias)


@dataclass(frozen=True)
class Parts:
    """A model as body and head; ``split`` says whether the two are the model's own."""

    model: nn.Module
    head: Head
    inner: nn.Module | None

    @property
    def split(self) -> bool:
        return self.inner is not None

    def body(self, ids: Tensor) -> Tensor:
        """(rows, tokens) ids -> (rows, tokens, d) last hidden states, or the logits where the model is not split."""
        if self.inner is None:
            return self.model(input_ids=ids).logits
        return self.inner(input_ids=ids, use_cache=False).last_hidden_state


@torch.no_grad()
def parts_of(model: nn.Module, ids: Tensor) -> Parts:
    """Body and head of a causal language model in eval mode, compared with the model's own logits on ``ids``.

    Args:
        model: returns ``logits`` (batch, tokens, vocabulary); may be wrapped by PEFT.
        ids: (n,) token ids; the first 64 are used.
    """
    whole = Parts(model, Head(None), None)
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    inner = getattr(base, getattr(base, "base_model_prefix", "") or "", None)
    projection = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if not isinstance(inner, nn.Module) or not isinstance(projection, nn.Module):
        return whole
    parts = Parts(model, Head(projection, *_after_projection(base)), inner)
    device = next(model.parameters()).device
    probe = ids.flatten()[None, :_PROBE].to(device)
    own = model(input_ids=probe).logits
    try:
        ours = parts.head.logits(parts.body(probe)[0])
    except Exception:  # a body of another kind: whatever it raises, the whole model is there
        return whole
    own_float = own[0].float()
    allowed = _TOLERANCE.get(own.dtype, 2e-2) * max(1.0, float(own_float.abs().max()))
    same = ours.shape == own_float.shape and float((ours - own_float).abs().max()) <= allowed
    return parts if same else whole


def _after_projection(model: Any) -> tuple[float, float | None]:
    """(scale, softcap) as the architectures that have them name them: Cohere, Granite, Falcon-H1; Gemma."""
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()  # type: ignore[union-attr]
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return scale / divisor, getattr(config, "final_logit_softcapping", None)


def chunks(count: int) -> Iterator[slice]:
    """Slices of at most ``CHUNK`` that cover ``range(count)``."""
    for start in range(0, count, CHUNK):
        yield slice(start, min(start + CHUNK, count))


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln p(target) in nats: (n,) float64 on the CPU, from (n, vocabulary) float32 logits and (n,) targets."""
    chosen = logits.gather(1, targets[:, None])[:, 0].double().cpu()
    if logits.device.type != "cpu" or not compiles():
        return torch.logsumexp(logits, 1).double().cpu() - chosen
    from loftq.evaluate import cpu_rows

    partition = torch.empty(logits.shape[0], dtype=torch.float64)
    rows = logits.contiguous()
    for_rows(cpu_rows.log_partition_rows, rows.shape[0], rows.numel(), rows.numpy(), partition.numpy())
    return partition - chosen


def losses_and_divergence(reference: Tensor, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`losses` of ``logits``, and KL(softmax(reference) ‖ softmax(logits)) in nats, (n,) float64 each."""
    chosen = logits.gather(1, targets[:, None])[:, 0].double().cpu()
    if logits.device.type != "cpu" or not compiles():
        log_p, log_q = torch.log_softmax(reference, 1), torch.log_softmax(logits, 1)
        apart = torch.where(log_p > -87, log_p.exp() * (log_p - log_q), 0.0)
        return torch.logsumexp(logits, 1).double().cpu() - chosen, apart.double().sum(1).cpu()
    from loftq.evaluate import cpu_rows

    p, q = reference.contiguous(), logits.contiguous()
    partition = torch.empty(q.shape[0], dtype=torch.float64)
    divergence = torch.empty_like(partition)
    args = (p.numpy(), q.numpy(), partition.numpy(), divergence.numpy())
    for_rows(cpu_rows.divergence_rows, q.shape[0], q.numel(), *args)
    return partition - chosen, divergence
