"""What looks on while a model is trained: the progress bar, early stopping, and an eye on divergence.

The last two begin with what a continued run has logged before, so that it ends where it would have without interruption.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

WINDOW = 25
"""Steps over which the loss is averaged to see whether it runs away."""
RISE = 2.0
"""Nats by which the averaged loss must exceed both its lowest and twice its lowest value to count as diverged."""


class Progress(TrainerCallback):
    """Feeds a progress bar."""

    def __init__(self, advance: Callable[[str, int], None]) -> None:
        self.advance = advance
        self.loss = ""

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.loss = f"loss {float(logs['loss']):.4f}"

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.advance(self.loss, 1)


class Patience(TrainerCallback):
    """Stops a run after so many measurements in a row without a better value of the first metric.

    transformers' own counts from 0 in a run that is continued.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best: float | None = None
        self.waited = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for logged in state.log_history:
            self._see(args, logged, control)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float],
        **kwargs: Any,
    ) -> None:
        self._see(args, metrics, control)

    def _see(self, args: TrainingArguments, values: Mapping[str, float], control: TrainerControl) -> None:
        value = values.get(str(args.metric_for_best_model))
        if value is None:
            return
        if self.best is None or (value > self.best if args.greater_is_better else value < self.best):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        if self.waited >= self.patience:
            control.should_training_stop = True


class Divergence(TrainerCallback):
    """Stops a run whose loss is no number any more, or has run away from the lowest it had.

    In float16 a step whose gradient overflows is left out and the loss is scaled down, as it has to be in the first steps:
    only many such steps in a row stop the run.

    Args:
        is_measured: whether measurements decide which checkpoint is the result. Where none do, no checkpoint is written
            while the loss is as high as that of a run that has diverged, which would soon take the place of a good one.

    Attributes:
        reason: what happened, once it did.
        good_until: the last step whose weights have given a loss within the bounds, in the step after it.
    """

    def __init__(self, is_measured: bool = False) -> None:
        self.is_measured = is_measured
        self.reason: str | None = None
        self.good_until = 0
        self.recent: deque[float] = deque(maxlen=WINDOW)
        self.lowest = math.inf
        self.skipped = 0
        self.is_high = False

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for logged in state.log_history:
            if "loss" in logged:
                self._see(args, int(logged["step"]), logged)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or self.reason is not None:
            return
        self._see(args, state.global_step, logs)
        if self.reason is not None:
            control.should_training_stop = True
        self._keep_nothing_bad(control)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._keep_nothing_bad(control)

    def _see(self, args: Any, step: int, logs: Mapping[str, Any]) -> None:
        loss = float(logs["loss"])
        overflow = not math.isfinite(float(logs.get("grad_norm") or 0.0))
        self.skipped = self.skipped + 1 if overflow else 0
        if not math.isfinite(loss):
            self.reason = f"the loss is no finite number at step {step}"
            return
        self.recent.append(loss)
        mean = sum(self.recent) / WINDOW
        if len(self.recent) == WINDOW:
            self.lowest = min(self.lowest, mean)
        bound = max(self.lowest + RISE, 2 * self.lowest)
        self.is_high = loss > bound
        if not self.is_high:
            self.good_until = step - 1
        if overflow and self.skipped > (WINDOW if args.fp16 else 0):
            self.reason = f"the gradient is no finite number at step {step}"
        elif len(self.recent) == WINDOW and mean > bound:
            self.reason = (
                f"the loss has risen from {self.lowest:.3g} to {mean:.3g} at step {step}, averaged over {WINDOW} steps"
            )

    def _keep_nothing_bad(self, control: TrainerControl) -> None:
        """A checkpoint of this state would be taken for a good one."""
        if self.reason is not None:
            control.should_save = control.should_evaluate = False
        elif self.is_high and not self.is_measured:
            control.should_save = False
