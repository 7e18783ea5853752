"""Inputs of the experts of a mixture that transformers keeps as one three-dimensional parameter.

For expert e, ``gate_up_proj`` (experts, 2 · intermediate, hidden) reads the tokens that the router sends to e, and
``down_proj`` (experts, hidden, intermediate) what the activation makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loftq.calibrate.groups import Group, identity
from loftq.calibrate.moments import Moment, Rows, Scratch, combine, unseen
from loftq.errors import ConfigError
from loftq.modules.experts import PARAMETERS, expert_shape, fused_experts
from loftq.solver.importance import InputStatistics


def check_experts(model: nn.Module, targets: Iterable[str]) -> dict[str, nn.Module]:
    """Parameter name -> the module that holds it.

    Raises:
        ConfigError: a name that is no such parameter.
    """
    known = fused_experts(model)
    found = {}
    for name in targets:
        if name not in known:
            raise ConfigError(f"{name!r} is no parameter with the experts of a layer in {type(model).__name__}")
        found[name] = model.get_submodule(name.rpartition(".")[0])
    return found


def unseen_experts(name: str, module: nn.Module) -> Group:
    """The group of a parameter that the text never reached."""
    leaf = name.rpartition(".")[2]
    nothing = unseen(expert_shape(module, leaf)[1])
    return Group((name,), partial(identity, nothing), [nothing] * getattr(module, leaf).shape[0])


class ExpertCollector:
    """Moments of the inputs of every expert of several layers.

    Args:
        modules: parameter name -> the module that holds it.
        full: E[x xᵀ] as matrices, or their diagonals. All experts of a layer are in memory together, in float64.
        min_tokens: an expert that got fewer inputs is given the moments of all experts' inputs together; by default a
            quarter of the length of x.
    """

    def __init__(self, modules: Mapping[str, nn.Module], *, full: bool, min_tokens: int | None = None) -> None:
        self.modules = modules
        self.full = full
        self.min_tokens = min_tokens
        self._scratch: Scratch = {}
        self._moments: dict[str, list[Moment]] = {}

    @contextmanager
    def run(self, rows: Rows) -> Iterator[None]:
        """Collect from what runs inside, which is one batch."""
        owners = {name.rpartition(".")[0]: module for name, module in self.modules.items()}
        handles = [
            module.register_forward_pre_hook(self._hook(owner, rows), with_kwargs=True)
            for owner, module in owners.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, owner: str, rows: Rows) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = dict(zip(("hidden_states", "top_k_index"), args, strict=False)) | kwargs
            self._add(owner, module, given["hidden_states"].detach(), given["top_k_index"], rows.mask)

        return before

    def _add(self, owner: str, module: Any, states: Tensor, chosen: Tensor, mask: Tensor) -> None:
        states, chosen = states.reshape(-1, states.shape[-1]), chosen.reshape(-1, chosen.shape[-1])
        real = mask.flatten() if mask.numel() == len(states) else torch.ones(len(states), dtype=torch.bool)
        up, down = (f"{owner}.{parameter}" for parameter in PARAMETERS)
        for expert in range(module.gate_up_proj.shape[0]):
            x = states[(chosen == expert).any(-1) & real]
            if not len(x):
                continue
            if up in self.modules:
                self._moment(up, module.gate_up_proj, expert, x.shape[1]).add(up, x)
            if down in self.modules:
                inner = _inner(module, expert, x)
                self._moment(down, module.gate_up_proj, expert, inner.shape[1]).add(down, inner)

    def _moment(self, name: str, weight: Tensor, expert: int, features: int) -> Moment:
        if name not in self._moments:
            self._moments[name] = [
                Moment(features, full=self.full, scratch=self._scratch) for _ in range(weight.shape[0])
            ]
        return self._moments[name][expert]

    def results(self) -> dict[str, tuple[InputStatistics, list[InputStatistics]]]:
        """Parameter name -> the statistics of all inputs together, and those of every expert."""
        self._scratch.clear()
        found = {}
        for name in list(self._moments):
            moments = self._moments.pop(name)
            features = moments[0].absolute.numel()
            least = features // 4 if self.min_tokens is None else self.min_tokens
            together = combine([m for m in moments if m.count] or moments)
            found[name] = (together, [combine([m]) if m.count >= max(1, least) else together for m in moments])
        return found


def _inner(module: Any, expert: int, x: Tensor) -> Tensor:
    """The input of expert ``expert``'s ``down_proj``."""
    weight = module.gate_up_proj[expert]
    y = x @ weight if getattr(module, "is_transposed", False) else x @ weight.T
    if getattr(module, "has_bias", False):
        y = y + module.gate_up_proj_bias[expert]
    inner: Tensor = module._apply_gate(y)
    return inner
