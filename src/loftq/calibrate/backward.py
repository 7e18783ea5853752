"""What the model listens to: gradients in every layer's outputs, with one block of the model in memory at a time.

A forward pass stops in front of every block, as in :mod:`loftq.calibrate.forward`, and collects the moments of its layers'
inputs. So does the backward pass, in the opposite order: there a block is run once more with its weights, for the gradients
in its layers' outputs. A window costs three times as much with its backward pass as without, and the inputs' moments gain
more from many windows than the gradients' do: so the backward pass may run on some of the windows only. What is
differentiated is the product of the logits with a random v with the Fisher information as its second moment,

    v = √p ∘ u - p (√p · u),        u = ±1 with equal probability,        E[v vᵀ] = diag(p) - p pᵀ

where p is the model's own distribution of the next token: to second order, an error e of a layer's output raises the
model's divergence from itself by ``½ eᵀ E[g gᵀ] e``. The cross entropy against a token drawn from p has the same second
moment, but where the model is sure of itself nearly all of it comes from the rare token that it did not expect.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loftq.calibrate.batches import Batch, make_batches
from loftq.calibrate.blocks import find_blocks, head_name
from loftq.calibrate.calls import tensors_in
from loftq.calibrate.drivers import Call, Driver, Stop, current_driver, start_all
from loftq.calibrate.experts import ExpertCollector, check_experts, unseen_experts
from loftq.calibrate.groups import Group, identity
from loftq.calibrate.moments import Moment, Rows, Scratch, combine, unseen
from loftq.calibrate.spill import Spill
from loftq.calibrate.streamed import Advance, Streamed, runs_again, within
from loftq.calibrate.text import CalibrationTokens
from loftq.calibrate.trace import Collector, in_features
from loftq.checkpoint.source import Source
from loftq.config import positive_int
from loftq.errors import SourceError
from loftq.modules.linear import is_transposed
from loftq.solver.importance import InputStatistics


class Back(NamedTuple):
    """A block's backward pass that waits for the gradients in the block's inputs.

    ``inputs`` are those of the tensors in the call that gradients are wanted for, ``gradients`` those in the outputs.
    """

    block: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...]


class _Inputs(NamedTuple):
    """What a block's layers get: names of layers with one input, and its statistics."""

    key: int
    groups: list[tuple[tuple[str, ...], InputStatistics]]


class StreamedGradients(Streamed):
    """One forward and one backward pass over a calibration text that hold one block of the model. A context manager.

    Args:
        source: the model; its forward must give ``logits``.
        targets: names of linear layers whose statistics are wanted.
        tokens: the text.
        windows: how many of the text's windows the backward pass runs on, spread evenly; ``None`` for all.
        fisher: the means of the square root of the diagonal Fisher information per row and column as well (LQ-LoRA).
        experts: names of parameters with all experts of a layer, of whose inputs the second moments are wanted, without
            gradients. Their groups come first, during the forward pass.
        batch_tokens: windows are run together up to this many tokens.
        spill_bytes: activations that wait beyond this many bytes are written to a temporary folder.
        dtype: in which the model runs.
        seed: of the signs u.
        progress: called with a block's name and the number of tokens that have passed it.

    Raises:
        SourceError: the model takes no text, gives no logits or lacks weights, or inputs are not finite.
        ConfigError: a target that is no linear layer, or windows beyond the model's positions.
        OutputError: no room for what is spilled.
    """

    def __init__(
        self,
        source: Source,
        targets: Collection[str],
        tokens: CalibrationTokens,
        *,
        windows: int | None = None,
        fisher: bool = False,
        experts: Collection[str] = (),
        batch_tokens: int = 1024,
        spill_bytes: int = 2_000_000_000,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        progress: Advance = lambda name, tokens: None,
    ) -> None:
        positive_int("windows", 1 if windows is None else windows)
        chosen, others = tokens.parted(tokens.ids.shape[0] if windows is None else windows)
        super().__init__(source, targets, chosen, batch_tokens, spill_bytes, dtype, progress)
        self.fisher = fisher
        self.seed = seed
        self._differentiated = len(self._batches)
        self._batches += [] if others is None else make_batches(self._model, others, batch_tokens)
        # one block's worth after another, whatever the model's depth: on disk at once
        self._moments = Spill(0)
        self._head = head_name(self._model, self._targets)
        self._experts = check_experts(self._model, experts)
        self._blocks = find_blocks(self._model, [*self._targets, *self._experts])
        self.work = len(self._blocks) * sum(int(b.tokens) for b in self._batches)
        self._blocks += [self._head] if self._head else []
        self.work += (len(self._blocks) + bool(self._head)) * sum(
            b.tokens for b in self._batches[: self._differentiated]
        )

    def groups(self) -> Iterator[Group]:
        """Every target, a group each, in the order of the backward pass: the last block first.

        Layers that share an input share the factors computed from it. Those that no gradient reaches come later, and what
        was never reached comes last.
        """
        unreached = {**self._targets, **self._experts}
        inputs: dict[str, _Inputs] = {}
        self._start()
        try:
            while (block := self._waiting(Call)) is not None:
                if block in inputs:
                    raise runs_again(block)
                self._load(block)
                collector = Collector(within(block, self._targets), full=True)
                of_experts = ExpertCollector(within(block, self._experts), full=True)
                while self._waiting(Call) == block:
                    self._each(Call, block, partial(self._forward, collector, of_experts))
                inputs[block] = self._put_away(len(inputs), collector)
                for name, (together, each) in of_experts.results().items():
                    del unreached[name]
                    yield Group((name,), partial(identity, together), each)
            while (block := self._waiting(Back)) is not None:
                self._load(block)
                gradients = _Gradients(within(block, self._targets), self.fisher)
                while self._waiting(Back) == block:
                    self._each(Back, block, partial(self._backward, gradients))
                for name, statistics in self._fetch(inputs.pop(block)):
                    del unreached[name]
                    yield Group((name,), partial(gradients.joined, name, statistics))
            for found in inputs.values():
                for name, statistics in self._fetch(found):
                    del unreached[name]
                    yield Group((name,), partial(identity, statistics))
        finally:
            self.close()
        for name, module in unreached.items():
            if name in self._targets:
                yield Group((name,), partial(unseen, in_features(module)))
            else:
                yield unseen_experts(name, module)

    def close(self) -> None:
        """End the passes and remove what was spilled."""
        try:
            super().close()
        finally:
            self._moments.close()

    def _put_away(self, key: int, collector: Collector) -> _Inputs:
        """The moments of a block's inputs wait for the backward pass."""
        found = _Inputs(key, collector.results() if collector.modules else [])
        self._moments.suspend(key, [statistics.second_moment for _, statistics in found.groups])
        return found

    def _fetch(self, found: _Inputs) -> Iterator[tuple[str, InputStatistics]]:
        self._moments.restore(found.key)
        self._moments.drop(found.key)
        for names, statistics in found.groups:
            for name in names:
                yield name, statistics

    # --- the passes

    def _start(self) -> None:
        self._weights.load(self._weights.outside(self._blocks))
        self._intercept(self._suspend)
        self._drivers = [
            Driver(partial(self._pass, index, batch), grad=True)
            if index < self._differentiated
            else Driver(partial(self._model, **batch.inputs))
            for index, batch in enumerate(self._batches)
        ]
        start_all(self._drivers, self._hold)

    def _pass(self, index: int, batch: Batch) -> None:
        """In a thread of its own: the model's forward, the loss, the backward pass."""
        logits = getattr(self._model(**batch.inputs), "logits", None)
        if not isinstance(logits, Tensor) or not logits.requires_grad:
            raise SourceError(
                f"{type(self._model).__name__} gives no logits that depend on its layers, expected a model with a head; "
                f"calibrate without gradients"
            )
        if logits.shape[:2] == batch.mask.shape:
            logits = logits[batch.mask]
        logits = logits.flatten(0, -2)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        with torch.no_grad():
            probability = logits.float().softmax(-1)
            probe = probability.sqrt()
            probe *= torch.randint(0, 2, probe.shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)
            probe -= probability.mul_(probe.sum(-1, keepdim=True))
            del probability
        logits.backward(probe.to(logits.dtype))

    def _suspend(self, block: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        driver = current_driver()
        if driver is None:
            return forward(*args, **kwargs)
        call = Call(block, args, kwargs)
        if not torch.is_grad_enabled():
            if block == self._head:
                raise Stop
            return driver.suspend(call)
        inputs = [t for t in tensors_in((args, kwargs)) if t.requires_grad]
        if not inputs:
            rows = args[0] if args and isinstance(args[0], Tensor) else next(iter(kwargs.values()), None)
            if not isinstance(rows, Tensor) or not rows.is_floating_point():
                return driver.suspend(call)  # an embedding: nothing before it is differentiated
            leaf = rows.detach().requires_grad_()  # here the backward pass ends
            call = Call(block, *_replaced((args, kwargs), {id(rows): leaf}))
            inputs = [leaf]
        box: list[Any] = []
        outputs = _Passed.apply(call, box, *inputs)
        (structure,) = box
        return _filled(structure, iter(outputs))

    def _waiting(self, kind: type[Call] | type[Back]) -> str | None:
        return next((d.call.block for d in self._drivers if isinstance(d.call, kind)), None)

    def _each(self, kind: type[Call] | type[Back], block: str, work: Callable[[Batch, Any], Any]) -> None:
        last = not within(block, {**self._targets, **self._experts})
        for position, (driver, batch) in enumerate(zip(self._drivers, self._batches, strict=True)):
            if not isinstance(driver.call, kind) or driver.call.block != block:
                continue
            self._spill.restore(position)
            driver.resume(work(batch, driver.call))
            if kind is Call and last and isinstance(driver.call, Back) and driver.call.block == block:
                # The head: its backward pass follows at once, so that one batch's logits are in memory and not all.
                driver.resume(self._backward(_Gradients({}, False), batch, driver.call))
            self._hold(position)
            self.progress(block, batch.tokens)

    @torch.no_grad()
    def _forward(self, collector: Collector, of_experts: ExpertCollector, batch: Batch, call: Call) -> Any:
        rows = self._rows(batch, call.block, (call.args, call.kwargs))
        with collector.run(rows), of_experts.run(rows):
            return self._model.get_submodule(call.block)(*call.args, **call.kwargs)

    @staticmethod
    def _rows(batch: Batch, block: str, arguments: Any) -> Rows:
        encoder, main = batch.masks_for(block)
        return Rows(main, encoder, tensors_in(arguments))

    def _backward(self, gradients: _Gradients, batch: Batch, back: Back) -> tuple[Any, ...]:
        rows = self._rows(batch, back.block, (back.args, back.kwargs))
        leaves = [t.detach().clone().requires_grad_() for t in back.inputs]
        swap = {id(t): leaf for t, leaf in zip(back.inputs, leaves, strict=True)}
        args, kwargs = _replaced((back.args, back.kwargs), swap)
        with torch.enable_grad(), gradients.run(rows):
            output = self._model.get_submodule(back.block)(*args, **kwargs)
            outputs = [t for t in tensors_in(output) if t.is_floating_point()]
            pairs = [(t, g) for t, g in zip(outputs, back.gradients, strict=True) if g is not None and t.requires_grad]
            return torch.autograd.grad([t for t, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)


class _Gradients:
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


class _Passed(torch.autograd.Function):
    """A block's call, seen from the pass's thread: both its output and its gradients come from the main thread."""

    @staticmethod
    def forward(ctx: Any, call: Call, box: list[Any], *inputs: Tensor) -> tuple[Tensor, ...]:
        driver = current_driver()
        assert driver is not None
        output = driver.suspend(call)
        ctx.call, ctx.inputs = call, inputs
        tensors = [t for t in tensors_in(output) if t.is_floating_point()]
        box.append(_structure(output))
        return tuple(tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        driver = current_driver()
        if driver is None:
            raise Stop
        back = Back(ctx.call.block, ctx.call.args, ctx.call.kwargs, ctx.inputs, gradients)
        del ctx.call
        return (None, None, *driver.suspend(back))


class _Hole:
    """Stands for a floating-point tensor in the structure of a block's output."""


def _structure(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Hole() if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_structure, value))
    if isinstance(value, (list, tuple)):
        return type(value)(_structure(item) for item in value)
    if isinstance(value, dict):
        return type(value)(**{k: _structure(v) for k, v in value.items()})
    return value


def _filled(structure: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(structure, _Hole):
        return next(tensors)
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        return type(structure)(*(_filled(item, tensors) for item in structure))
    if isinstance(structure, (list, tuple)):
        return type(structure)(_filled(item, tensors) for item in structure)
    if isinstance(structure, dict):
        return type(structure)(**{k: _filled(v, tensors) for k, v in structure.items()})
    return structure


def _replaced(value: Any, swap: dict[int, Tensor]) -> Any:
    """The structure with some tensors exchanged, and all others cut off from the pass's own graph."""
    if isinstance(value, Tensor):
        return swap.get(id(value), value.detach() if value.requires_grad else value)
    if type(value) in (list, tuple):
        return type(value)(_replaced(item, swap) for item in value)
    if type(value) is dict:
        return {k: _replaced(v, swap) for k, v in value.items()}
    return value


def _out_features(module: nn.Module) -> int:
    weight: Any = module.weight
    return int(weight.shape[1 if is_transposed(module) else 0])
