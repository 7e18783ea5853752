"""The stage ``model``: tune all adapters together, so that the whole model does what the full-precision one does.

``kl``: the mean Kullback-Leibler divergence of the next-token distribution from the full-precision model's. ``rilq``: half
the squared error of the last hidden state relative to its variance, half the cross entropy of the next token (RILQ, arXiv
2412.01129). A model without a next-token head has the squared error alone.

What is reported, and what decides which state is kept, is the divergence on the held-out windows for every loss (the
squared error for a model without a head).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loftq.refine.loss import Head, distillation
from loftq.refine.optimizer import Optimizer, put_back, snapshot
from loftq.refine.settings import RefineSettings
from loftq.refine.teacher import TokenStates, body, last_hidden
from loftq.refine.windows import Windows

EVALUATIONS = 8  # in a full run
SLOWER = 1 / 3
"""Factor of the learning rate after an evaluation that is no better than the best, to which the run returns.

How large a step helps depends on how far the quantized model still is from the original, which nobody knows beforehand.
"""


class Distance:
    """How far a quantized model is from the full-precision one, whose last hidden states and head are at hand."""

    def __init__(
        self,
        student: nn.Module,
        states: TokenStates,
        heads: tuple[Head, Head] | None,
        windows: Windows,
        settings: RefineSettings,
    ) -> None:
        self.student = student
        self.body = body(student)
        self.states = states
        self.heads = heads
        self.windows = windows
        self.settings = settings
        self.device = next(student.parameters()).device

    @property
    def metric(self) -> str:
        """Name of the measure; see :class:`~loftq.refine.record.RefinementReport`."""
        return "hidden" if self.heads is None else "kl"

    def _outputs(self, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """(n, width) of the quantized and of the full-precision model, and the next tokens, where the mask is true."""
        hidden = last_hidden(self.body, self.windows.inputs(rows, self.device))
        mask = self.windows.mask[rows]
        target = self.states[rows][mask].to(self.device)
        return hidden[mask.to(self.device)], target, self.windows.targets(rows)[mask.flatten()].to(self.device)

    def loss(self, rows: list[int]) -> Tensor:
        """What is minimised."""
        hidden, target, labels = self._outputs(rows)
        if self.heads is None:
            return _squared_error(hidden, target)
        if self.settings.loss == "kl":
            return distillation(hidden, target, *self.heads)[0]
        cross_entropy = distillation(hidden, target, *self.heads, labels, kl=0.0, ce=0.5)[0]
        return 0.5 * _squared_error(hidden, target) + cross_entropy

    @torch.no_grad()
    def held_out(self) -> float:
        """The metric on the held-out windows, each token counted once."""
        total = count = 0.0
        for rows in self.windows.batches(self.windows.held, self.settings.batch_tokens):
            hidden, target, _ = self._outputs(rows)
            if self.heads is None:
                value = float(_squared_error(hidden, target))
            else:
                value = distillation(hidden, target, *self.heads)[1]["kl"]
            total += value * len(hidden)
            count += len(hidden)
        return total / count


def _squared_error(hidden: Tensor, target: Tensor) -> Tensor:
    """|g − h|² relative to the variance of h."""
    target = target.float()
    return (hidden.float() - target).square().mean() / target.var(correction=0)


class ModelStage:
    """Steps over all windows, with the best state on the held-out ones.

    Args:
        distance: what is minimised and judged by.
        parameters: name -> what is trained.
    """

    def __init__(self, distance: Distance, parameters: Mapping[str, nn.Parameter], before: float) -> None:
        self.distance = distance
        self.parameters = parameters
        self.settings = distance.settings
        self.windows = distance.windows
        self.per_epoch = len(self.windows.batches(self.windows.train, self.settings.batch_tokens))
        steps = self.settings.epochs * self.per_epoch
        step_tokens = max(1, self.settings.batch_tokens // self.windows.ids.shape[1]) * self.windows.ids.shape[1]
        if self.settings.max_tokens is not None:
            steps = min(steps, max(1, self.settings.max_tokens // step_tokens))
        self.steps = steps
        self.every = max(1, math.ceil(steps / EVALUATIONS))
        self.optimizer = Optimizer(parameters, self.settings.learning_rate, self.settings.scales_learning_rate, steps)
        self.lowest = before
        self.best = snapshot(parameters)
        self.waited = 0
        self.tokens = 0
        self.curve: list[dict[str, Any]] = []
        self._recent: list[float] = []

    def progress(self) -> dict[str, Any]:
        """All that :meth:`restore` needs besides the tensors."""
        return {
            "step": self.optimizer.step_number,
            "lowest": self.lowest,
            "waited": self.waited,
            "factor": self.optimizer.factor,
            "tokens": self.tokens,
            "curve": self.curve,
            "recent": self._recent,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, the best ones, and the optimizer's moments."""
        found: dict[str, Tensor] = {f"p.{n}": p.detach() for n, p in self.parameters.items()}
        found.update({f"b.{n}": t for n, t in self.best.items()})
        found.update(self.optimizer.tensors())
        return found

    def restore(self, progress: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Continue where :meth:`progress` and :meth:`tensors` were taken."""
        put_back(self.parameters, {n: tensors[f"p.{n}"] for n in self.parameters})
        self.best = {n: tensors[f"b.{n}"].to(p.device).clone() for n, p in self.parameters.items()}
        self.optimizer.restore(tensors, progress["step"])
        self.optimizer.factor = progress["factor"]
        self.lowest, self.waited, self.tokens = progress["lowest"], progress["waited"], progress["tokens"]
        self.curve, self._recent = list(progress["curve"]), list(progress["recent"])

    def run(self, after_step: Callable[[], None], advance: Callable[[str, int], None]) -> None:
        """All steps that are left; the parameters are the best ones in the end."""
        for p in self.parameters.values():
            p.requires_grad_(True)
        try:
            while self.optimizer.step_number < self.steps and self.waited < self.settings.patience:
                rows = self._rows(self.optimizer.step_number)
                loss = self.distance.loss(rows)
                loss.backward()
                self._recent.append(float(loss.detach()))
                finite = self.optimizer.step()
                tokens = len(rows) * self.windows.ids.shape[1]
                self.tokens += tokens
                advance(f"loss {self._recent[-1]:.4f}", tokens)
                step = self.optimizer.step_number
                if step % self.every == 0 or step == self.steps or not finite:
                    self._evaluate(step)
                if not finite:
                    break
                after_step()
        finally:
            for p in self.parameters.values():
                p.requires_grad_(False)
        put_back(self.parameters, self.best)

    def _rows(self, step: int) -> list[int]:
        epoch, within = divmod(step, self.per_epoch)
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.windows.train), generator=generator)
        return self.windows.batches(order, self.settings.batch_tokens)[within]

    def _evaluate(self, step: int) -> None:
        value = self.distance.held_out()
        loss = sum(self._recent) / len(self._recent)
        self._recent = []
        rate = self.settings.learning_rate * self.optimizer.factor
        self.curve.append({"step": step, "loss": _number(loss), "held_out": _number(value), "learning_rate": rate})
        if value < self.lowest:
            self.lowest, self.best, self.waited = value, snapshot(self.parameters), 0
        else:
            self.waited += 1
            put_back(self.parameters, self.best)
            self.optimizer.slow_down(SLOWER)


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
