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
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loftq.calibrate.batches import Batch, make_batches
from loftq.calibrate.blocks import find_blocks, head_name
from loftq.calibrate.calls import filled, replaced, structure_of, tensors_in
from loftq.calibrate.drivers import Call, Driver, Stop, current_driver, start_all
from loftq.calibrate.experts import ExpertCollector, check_experts, unseen_experts
from loftq.calibrate.gradients import Gradients
from loftq.calibrate.groups import Group, identity
from loftq.calibrate.moments import Rows, unseen
from loftq.calibrate.spill import Spill
from loftq.calibrate.streamed import Advance, Streamed, runs_again, within
from loftq.calibrate.text import CalibrationTokens
from loftq.calibrate.trace import Collector, in_features
from loftq.checkpoint.source import Source
from loftq.config import positive_int
from loftq.errors import SourceError
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
                gradients = Gradients(within(block, self._targets), self.fisher)
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
            call = Call(block, *replaced((args, kwargs), {id(rows): leaf}))
            inputs = [leaf]
        box: list[Any] = []
        outputs = _Passed.apply(call, box, *inputs)
        (structure,) = box
        return filled(structure, iter(outputs))

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
                driver.resume(self._backward(Gradients({}, False), batch, driver.call))
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

    def _backward(self, gradients: Gradients, batch: Batch, back: Back) -> tuple[Any, ...]:
        rows = self._rows(batch, back.block, (back.args, back.kwargs))
        leaves = [t.detach().clone().requires_grad_() for t in back.inputs]
        swap = {id(t): leaf for t, leaf in zip(back.inputs, leaves, strict=True)}
        args, kwargs = replaced((back.args, back.kwargs), swap)
        with torch.enable_grad(), gradients.run(rows):
            output = self._model.get_submodule(back.block)(*args, **kwargs)
            outputs = [t for t in tensors_in(output) if t.is_floating_point()]
            pairs = [(t, g) for t, g in zip(outputs, back.gradients, strict=True) if g is not None and t.requires_grad]
            return torch.autograd.grad([t for t, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)


class _Passed(torch.autograd.Function):
    """A block's call, seen from the pass's thread: both its output and its gradients come from the main thread."""

    @staticmethod
    def forward(ctx: Any, call: Call, box: list[Any], *inputs: Tensor) -> tuple[Tensor, ...]:
        driver = current_driver()
        assert driver is not None
        output = driver.suspend(call)
        ctx.call, ctx.inputs = call, inputs
        tensors = [t for t in tensors_in(output) if t.is_floating_point()]
        box.append(structure_of(output))
        return tuple(tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        driver = current_driver()
        if driver is None:
            raise Stop
        back = Back(ctx.call.block, ctx.call.args, ctx.call.kwargs, ctx.inputs, gradients)
        del ctx.call
        return (None, None, *driver.suspend(back))
