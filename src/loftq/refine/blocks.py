"""The stage ``blocks``: tune the adapters block by block, so that each block does what the full-precision one does.

After ApiQ-bw (arXiv 2402.05147, section 4). With a block F of the full-precision model, the same block G of the quantized
one, F's input x and the input x̂ that G gets from the quantized blocks before it, minimise

    ½ d(G(x), F(x)) + ½ d(G(x̂), F(x)),   d(a, b) = mean over tokens of |a − b|² / |b|²

The first term is the block's own error, the second also undoes the errors of the blocks before. Each token counts the
same, whatever its size: a few tokens' hidden states can be a thousand times larger than all others. Only one block has
gradients and optimizer states at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loftq.errors import ConfigError
from loftq.refine.layers import AdaptedLinear
from loftq.refine.optimizer import Optimizer, put_back, snapshot
from loftq.refine.settings import RefineSettings
from loftq.refine.teacher import TokenStates, body
from loftq.refine.windows import Windows


class _Reached(Exception):
    """The first block: nothing behind it needs to run."""


@dataclass
class _Call:
    """What a block is called with besides the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def block_names(model: nn.Module, adapted: Mapping[str, Any]) -> list[str]:
    """Names of the model's repeated blocks: the elements of the ``ModuleList`` that holds most of the adapted layers.

    Raises:
        ConfigError: no adapted layer is in one.
    """
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            found[name] = sum(layer.startswith(f"{name}.") for layer in adapted)
    best = max(found, key=lambda name: found[name], default=None)
    if best is None or not found[best]:
        raise ConfigError(
            f"{type(model).__name__} has no list of blocks with an adapter in it, which the stage 'blocks' needs; choose "
            f"--stages model"
        )
    return [f"{best}.{child}" for child, _ in model.get_submodule(best).named_children()]


class Stream:
    """One model's hidden states between its blocks, for every window, and how each block is called."""

    def __init__(self, model: nn.Module, names: list[str], windows: Windows, batch_tokens: int) -> None:
        self.model = model
        self.blocks = [model.get_submodule(name) for name in names]
        self.windows = windows
        self.device = next(model.parameters()).device
        self._calls: dict[tuple[int, ...], list[_Call]] = {}
        self._masked = not bool(windows.mask.all())

    def calls(self, rows: list[int]) -> list[_Call]:
        """How every block is called for these windows. Without a mask that depends on their number only."""
        key = tuple(rows) if self._masked else (len(rows),)
        if key not in self._calls:
            calls: dict[int, _Call] = {}
            hooks = [
                block.register_forward_pre_hook(
                    lambda _, args, kwargs, i=i: calls.__setitem__(i, _Call(*_split(args, kwargs)[1:])),
                    with_kwargs=True,
                )
                for i, block in enumerate(self.blocks)
            ]
            try:
                with torch.no_grad():
                    body(self.model)(**self.windows.inputs(rows, self.device))
            finally:
                for hook in hooks:
                    hook.remove()
            self._calls[key] = [calls[i] for i in range(len(self.blocks))]
        return self._calls[key]

    @torch.no_grad()
    def first_input(self, rows: list[int]) -> Tensor:
        """(rows, length, width) what the first block gets."""
        caught: list[Tensor] = []

        def catch(_: nn.Module, args: Any, kwargs: Any) -> None:
            caught.append(_split(args, kwargs)[0])
            raise _Reached

        hook = self.blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            body(self.model)(**self.windows.inputs(rows, self.device))
        except _Reached:
            pass
        finally:
            hook.remove()
        return caught[0]

    def run(self, index: int, hidden: Tensor, rows: list[int]) -> Tensor:
        """A block's output for these windows' inputs."""
        call = self.calls(rows)[index]
        output = self.blocks[index](hidden.to(self.device), *call.args, **call.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """(hidden state, other positional arguments, keyword arguments)."""
    if args:
        return args[0], args[1:], dict(kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def relative_error(actual: Tensor, expected: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens in ``mask`` of |actual − expected|² / |expected|², in float32."""
    actual, expected = actual[mask].float(), expected[mask].float()
    size = expected.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((actual - expected).square().sum(-1) / size).mean()


class BlockStage:
    """Runs the stage from a given block on.

    Args:
        teacher, student: the models. layers: the student's adapted layers by name.
        parameters: name -> what is trained, in all blocks.
        windows, settings: the text, and what was chosen.
        folder, budget: where hidden states go, and when.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        layers: Mapping[str, Any],
        parameters: Mapping[str, nn.Parameter],
        windows: Windows,
        settings: RefineSettings,
        folder: Path,
        budget: int,
    ) -> None:
        self.names = block_names(student, {n: m for n, m in layers.items() if isinstance(m, AdaptedLinear)})
        self.parameters = parameters
        self.windows = windows
        self.settings = settings
        self.batches = windows.batches(range(len(windows.ids)), settings.batch_tokens)
        self.full = Stream(teacher, self.names, windows, settings.batch_tokens)
        self.quantized = Stream(student, self.names, windows, settings.batch_tokens)
        self.tokens = 0
        self.steps = 0
        states = []
        for k, stream in enumerate((self.full, self.quantized)):
            first = stream.first_input(self.batches[0])
            shape = (*windows.ids.shape, first.shape[2])
            states.append(TokenStates(shape, first.dtype, folder / f"stream{k}", budget))
            for rows in self.batches:
                states[k][rows] = stream.first_input(rows)
        self.full_states, self.quantized_states = states
        self.target_states = TokenStates(shape, first.dtype, folder / "stream2", budget)

    def run(self, begin: int, done: Callable[[int, dict[str, Any]], None], advance: Callable[[str, int], None]) -> None:
        """Tune every block from ``begin`` on; ``done(block, record)`` after each."""
        for index, name in enumerate(self.names):
            for rows in self.batches:
                with torch.no_grad():
                    self.target_states[rows] = self.full.run(index, self.full_states[rows], rows)
            if index >= begin:
                record = self._tune(index, name, advance)
            for rows in self.batches:
                with torch.no_grad():
                    self.quantized_states[rows] = self.quantized.run(index, self.quantized_states[rows], rows)
            self.full_states, self.target_states = self.target_states, self.full_states
            if index >= begin:
                done(index, record)

    def _tune(self, index: int, name: str, advance: Callable[[str, int], None]) -> dict[str, Any]:
        inside = {n: p for n, p in self.parameters.items() if n.startswith(f"{name}.")}
        if not inside:
            return {"block": name, "before": 0.0, "after": 0.0}
        train, settings = len(self.windows.train), self.settings
        steps = settings.block_epochs * len(self.windows.batches(range(train), settings.batch_tokens))
        optimizer = Optimizer(inside, settings.learning_rate, settings.scales_learning_rate, steps)
        before = lowest = self._held_out(index)
        best = snapshot(inside)
        for p in inside.values():
            p.requires_grad_(True)
        try:
            for epoch in range(settings.block_epochs):
                generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + index * 1009 + epoch)
                order = torch.randperm(train, generator=generator)
                for rows in self.windows.batches(order, settings.batch_tokens):
                    loss = self._loss(index, rows)
                    loss.backward()
                    optimizer.step()
                    self.steps += 1
                    self.tokens += len(rows) * self.windows.ids.shape[1]
                    advance(name, len(rows) * self.windows.ids.shape[1])
                error = self._held_out(index)
                if error < lowest:
                    lowest, best = error, snapshot(inside)
        finally:
            for p in inside.values():
                p.requires_grad_(False)
            put_back(inside, best)
        return {"block": name, "before": before, "after": lowest}

    def _loss(self, index: int, rows: list[int]) -> Tensor:
        mask, target = self.windows.mask[rows].to(self.full.device), self.target_states[rows].to(self.full.device)
        same = relative_error(self.quantized.run(index, self.full_states[rows], rows), target, mask)
        own = relative_error(self.quantized.run(index, self.quantized_states[rows], rows), target, mask)
        return 0.5 * same + 0.5 * own

    @torch.no_grad()
    def _held_out(self, index: int) -> float:
        batches = self.windows.batches(self.windows.held, self.settings.batch_tokens)
        losses = [float(self._loss(index, rows)) * len(rows) for rows in batches]
        return sum(losses) / len(self.windows.held)
