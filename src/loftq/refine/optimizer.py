"""Adam with a warm-up, a cosine decay and a bound on the gradient's norm, whose state can be saved and restored."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

WARM_UP = 0.05  # share of the steps
BETAS = (0.9, 0.99)  # runs are of tens to hundreds of steps: the usual 0.999 would remember the first ones throughout
CLIP = 1.0


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rate at a step from 0: linear up over the first 5 %, a half cosine down to 0."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class Optimizer:
    """Steps over named parameters; those named ``….factor`` have a learning rate of their own.

    Attributes:
        factor: of the learning rates, for who finds them too high.

    Args:
        parameters: name -> parameter.
        learning_rate, scales_learning_rate: the highest.
        steps: how many there will be.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], learning_rate: float, scales_learning_rate: float, steps: int
    ) -> None:
        self.parameters = dict(parameters)
        self.steps = steps
        self.step_number = 0
        self.factor = 1.0
        adapters = [p for n, p in self.parameters.items() if not n.endswith(".factor")]
        factors = [p for n, p in self.parameters.items() if n.endswith(".factor")]
        groups = [(adapters, learning_rate), (factors, scales_learning_rate)]
        self._rates = [rate for group, rate in groups if group]
        self._adam = torch.optim.AdamW(
            [{"params": group, "lr": rate} for group, rate in groups if group],
            betas=BETAS,
            weight_decay=0.0,
            fused=True,
        )

    def step(self) -> bool:
        """One step, if the gradients are finite; they are cleared."""
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), CLIP)
        finite = bool(torch.isfinite(norm))
        if finite:
            for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
                group["lr"] = self.factor * rate * schedule(self.step_number, self.steps)
            self._adam.step()
        self._adam.zero_grad()
        self.step_number += 1
        return finite

    def slow_down(self, factor: float) -> None:
        """Smaller steps from now on, in directions that what was left behind does not decide."""
        self.factor *= factor
        for state in self._adam.state.values():
            state["exp_avg"].zero_()

    def tensors(self) -> dict[str, Tensor]:
        """First and second moments as ``m.NAME`` and ``v.NAME``."""
        found = {}
        for name, parameter in self.parameters.items():
            state = self._adam.state.get(parameter)
            if state:
                found[f"m.{name}"], found[f"v.{name}"] = state["exp_avg"], state["exp_avg_sq"]
        return found

    def restore(self, tensors: Mapping[str, Tensor], step_number: int) -> None:
        """Continue after ``step_number`` steps."""
        self.step_number = step_number
        for name, parameter in self.parameters.items():
            if f"m.{name}" in tensors:
                self._adam.state[parameter] = {
                    "step": torch.tensor(float(step_number), device=parameter.device),
                    "exp_avg": tensors[f"m.{name}"].to(parameter.device).clone(),
                    "exp_avg_sq": tensors[f"v.{name}"].to(parameter.device).clone(),
                }


def snapshot(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies of the parameters' values."""
    return {name: p.detach().clone() for name, p in parameters.items()}


@torch.no_grad()
def put_back(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Copy values into parameters of the same names."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
