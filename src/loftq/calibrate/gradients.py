"""Second moments of the gradients in the outputs of layers, collected while a backward pass runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loftq.calibrate.moments import Moment, Rows, Scratch, combine
from loftq.calibrate.trace import in_features
from loftq.modules.linear import is_transposed
from loftq.solver.importance import InputStatistics


class Gradients:
    """Second moments of the gradients in the outputs of several layers, and of the inputs they belong to."""

    def __init__(self, modules: dict[str, nn.Module], fisher: bool) -> None:
        self.modules = modules
        self.fisher = fisher
        self._moments = {name: Moment(_out_features(module)) for name, module in modules.items()}
        scratch: Scratch = {}
        self._guided = {name: Moment(in_features(module), scratch=scratch) for name, module in modules.items()}
        self._squares: dict[str, Tensor] = {}

    @contextmanager
    def run(self, rows: Rows) -> Iterator[None]:
        """What is called within adds its gradients, once they are computed."""
        with ExitStack() as stack:
            for name, module in self.modules.items():
                handle = module.register_forward_hook(partial(self._seen, name, rows))
                stack.callback(handle.remove)
            yield

    def _seen(self, name: str, rows: Rows, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if not output.requires_grad:
            return
        x = args[0].detach()

        def add(gradient: Tensor) -> None:
            selected, weight, _ = rows.select(gradient, x)
            self._moments[name].add(name, selected, weight)
            inputs, _, _ = rows.select(x)
            self._guided[name].add(name, inputs * torch.linalg.vector_norm(selected, dim=1, keepdim=True), weight)
            if self.fisher:
                windows = gradient.transpose(1, 2) @ x if gradient.dim() == 3 else (gradient.T @ x)[None]
                self._squares[name] = self._squares.get(name, 0) + windows.square().sum(0)

        output.register_hook(add)

    def joined(self, name: str, statistics: InputStatistics) -> InputStatistics:
        """A layer's input statistics with those of its gradients, as they were where no gradient has reached it."""
        moment, guided = self._moments.pop(name), self._guided.pop(name)
        if moment.count == 0:
            return statistics
        found = {"output_moment": combine([moment]).second_moment}
        power = found["output_moment"].diagonal().double().sum()
        if float(power) > 0:
            found["guided_moment"] = combine([guided]).second_moment.div_(power)
        if self.fisher:
            root = (self._squares.pop(name) / moment.count).sqrt()
            found.update(fisher_rows=root.mean(1), fisher_columns=root.mean(0))
        return statistics.of_layer(**found)


def _out_features(module: nn.Module) -> int:
    weight: Any = module.weight
    return int(weight.shape[1 if is_transposed(module) else 0])
