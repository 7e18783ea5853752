"""The distance between two language models' next-token distributions, without the logits of all tokens at once.

For a token with the full-precision model's last hidden state h and the quantized one's g, logits t = H h and s = Hʹ g,
p = softmax(t), q = softmax(s) and the next token y:

    KL = Σ p (log p − log q) = logsumexp(s) − logsumexp(t) − Σ p (s − t),   dKL/ds = q − p
    CE = logsumexp(s) − s[y],                                               dCE/ds = q − onehot(y)

Tokens are taken in chunks. The gradient with respect to g is computed together with the loss, so that a chunk's logits
are made once and are gone when the next chunk begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 24_000_000  # of one chunk's logits in float32: several such matrices exist at a time


@dataclass(frozen=True)
class Head:
    """An output layer: logits = factor · (hidden weightᵀ + bias), weight (vocabulary, width)."""

    weight: Tensor
    bias: Tensor | None = None
    factor: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, vocabulary) float32; the product is computed in the weight's dtype."""
        z = (hidden.to(self.weight.dtype) @ self.weight.T).float()
        if self.bias is not None:
            z += self.bias
        return z if self.factor == 1.0 else z.mul_(self.factor)

    def differences(self, hidden: Tensor) -> Tensor:
        """What the logits change by for a change of the hidden state."""
        z = (hidden.to(self.weight.dtype) @ self.weight.T).float()
        return z if self.factor == 1.0 else z.mul_(self.factor)


def distillation(
    student: Tensor,
    teacher: Tensor,
    student_head: Head,
    teacher_head: Head,
    targets: Tensor | None = None,
    *,
    kl: float = 1.0,
    ce: float = 0.0,
    chunk: int | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """kl · mean KL + ce · mean CE, differentiable with respect to ``student``; and both means.

    Args:
        student: (n, width) last hidden states of the quantized model, g.
        teacher: (n, width) last hidden states of the full-precision model, h.
        student_head, teacher_head: their output layers. Where they are one object, the logits' difference is computed
            from the difference of the hidden states: in bfloat16 its error then goes to 0 with it.
        targets: (n,) next tokens, −1 where there is none; needed for CE.
        kl, ce: weights.
        chunk: tokens at a time.
    """
    parts: dict[str, float] = {}
    options = (student_head, teacher_head, targets, kl, ce, chunk, parts)
    loss: Tensor = _Distillation.apply(student, teacher, options)
    return loss, parts


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, options: Any) -> Tensor:
        student_head, teacher_head, targets, kl, ce, chunk, parts = options
        n, vocabulary = student.shape[0], teacher_head.weight.shape[0]
        chunk = chunk or max(16, CHUNK_BYTES // (4 * vocabulary))
        wants_grad = ctx.needs_input_grad[0]
        grad = torch.empty_like(student) if wants_grad else None
        labelled = 0 if targets is None else int((targets >= 0).sum())
        kl_sum = torch.zeros((), dtype=torch.float64, device=student.device)
        ce_sum = torch.zeros_like(kl_sum)
        weight = student_head.weight
        for start in range(0, n, chunk):
            part = slice(start, start + chunk)
            p = teacher_head.logits(teacher[part])
            if student_head is teacher_head:
                change = student_head.differences(student[part].float() - teacher[part].float())
                q = p + change
            else:
                q = student_head.logits(student[part])
                change = q - p
            log_p, log_q = torch.logsumexp(p, 1, keepdim=True), torch.logsumexp(q, 1, keepdim=True)
            p.sub_(log_p).exp_()
            mean_change = torch.linalg.vecdot(p, change)
            kl_sum += (log_q - log_p).squeeze(1).double().sum() - mean_change.double().sum()
            if labelled:
                y = targets[part]
                rows = (y >= 0).nonzero().squeeze(1)
                ce_sum += (log_q[rows, 0] - q[rows, y[rows]]).double().sum()
            if grad is None:
                continue
            q.sub_(log_q).exp_()
            if labelled and ce:
                d = q.mul(kl / n).sub_(p, alpha=kl / n)
                q.index_put_((rows, y[rows]), q.new_tensor(-1.0), accumulate=True)
                d[rows] += q[rows] * (ce / labelled)
            else:
                d = q.sub_(p).mul_(kl / n)
            if student_head.factor != 1.0:
                d.mul_(student_head.factor)
            grad[part] = d.to(weight.dtype) @ weight
        parts["kl"] = float(kl_sum) / n
        if labelled:
            parts["ce"] = float(ce_sum) / labelled
        if grad is not None:
            ctx.save_for_backward(grad)
        return torch.tensor(kl * parts["kl"] + ce * parts.get("ce", 0.0), dtype=torch.float32, device=student.device)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_loss.to(grad.dtype), None, None
