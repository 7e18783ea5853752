"""What every layer's inputs are on a calibration text, with one block of the model in memory at a time.

The model's own ``forward`` runs once a batch and stops in front of every block (an element of a ``ModuleList``, such as a
decoder layer). Then the block's weights are read, the block runs for every batch, and its weights are freed. Whatever the
architecture computes between blocks is its own code; nothing here knows it.

With ``propagate=True`` there are two passes side by side: one of the full-precision model, whose inputs are x̂, and one
in which every layer is replaced by what has been made of it, whose inputs are x.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loftq.calibrate.batches import Batch
from loftq.calibrate.blocks import find_blocks, head_name, return_memory
from loftq.calibrate.calls import copied, tensors_of
from loftq.calibrate.drivers import Call, Driver, Stop, current_driver, start_all
from loftq.calibrate.experts import ExpertCollector, check_experts, unseen_experts
from loftq.calibrate.groups import Group, identity
from loftq.calibrate.moments import Moment, Rows, combine, unseen
from loftq.calibrate.streamed import Advance, Streamed, runs_again, within
from loftq.calibrate.text import CalibrationTokens
from loftq.calibrate.trace import Collector, Trace, grouped, in_features, watching
from loftq.checkpoint.source import Source
from loftq.errors import ConfigError
from loftq.solver.importance import InputStatistics


class _Reached(BaseException):
    """The inputs that were asked for have been seen; the rest of the block need not run."""


class StreamedForward(Streamed):
    """Forward passes over a calibration text that hold one block of the model. A context manager.

    Args:
        source: the model.
        targets: names of linear layers whose inputs are wanted.
        tokens: the text.
        propagate: run a second pass behind the layers given to :meth:`replace`. A block that is called several times in
            one forward pass (ALBERT) is then calibrated on its first call.
        full: E[x xᵀ] as a matrix, or its diagonal only, in which case there is no drift.
        batch_tokens: windows are run together up to this many tokens.
        spill_bytes: activations that wait beyond this many bytes are written to a temporary folder.
        dtype: in which the model runs, float32 or float64.
        experts: names of parameters with all experts of a layer (``….experts.gate_up_proj``, ``….experts.down_proj``),
            whose inputs are wanted as well. Their groups come after the other layers of the block; not with ``propagate``.
        min_tokens: an expert with fewer inputs gets the statistics of all; by default a quarter of its input's length.
        progress: called with a block's name and the number of tokens that have passed it; :attr:`work` in total.

    Raises:
        SourceError: the model takes no text or lacks weights, or inputs are not finite.
        ConfigError: a target that is no linear layer, or windows beyond the model's positions.
        OutputError: no room for what is spilled.
    """

    def __init__(
        self,
        source: Source,
        targets: Collection[str],
        tokens: CalibrationTokens,
        *,
        propagate: bool = False,
        full: bool = True,
        batch_tokens: int = 2048,
        spill_bytes: int = 2_000_000_000,
        dtype: torch.dtype = torch.float32,
        experts: Collection[str] = (),
        min_tokens: int | None = None,
        progress: Advance = lambda name, tokens: None,
    ) -> None:
        super().__init__(source, targets, tokens, batch_tokens, spill_bytes, dtype, progress)
        self.propagate = propagate
        self.full = full
        self.dtype = dtype
        self._experts = check_experts(self._model, experts)
        if propagate and self._experts:
            raise ConfigError("experts were given with propagate=True, expected one of the two")
        self._blocks = find_blocks(self._model, [*self._targets, *self._experts])
        self._targets_of = {block: within(block, self._targets) for block in self._blocks}
        self._experts_of = {
            block: ExpertCollector(found, full=full, min_tokens=min_tokens)
            for block in self._blocks
            if (found := within(block, self._experts))
        }
        self.work = len(self._blocks) * sum(int(b.tokens) for b in self._batches) * (2 if propagate else 1)
        self._replaced: dict[str, Tensor] = {}
        self._open: set[str] = set()  # the layers that may be replaced now

    def groups(self) -> Iterator[Group]:
        """The targets in forward order, those that share an input together; what was never reached comes last.

        With ``propagate=True`` every layer of a group must be replaced before the next group is asked for.
        """
        left = {block for block, targets in self._targets_of.items() if targets or block in self._experts_of}
        unreached = {**self._targets, **self._experts}
        self._start()
        try:
            while left and (block := self._waiting()) is not None:
                targets = self._targets_of[block]
                if (targets or block in self._experts_of) and block not in left:
                    raise runs_again(block)
                left.discard(block)
                self._load(block)
                self._replaced = {}
                for group in self._paired(block, targets) if self.propagate else self._collected(block, targets):
                    for name in group.names:
                        unreached.pop(name, None)
                    yield group
        finally:
            self.close()
        for name, module in unreached.items():
            if name in self._targets:
                yield Group((name,), partial(unseen, in_features(module)))
            else:
                yield unseen_experts(name, module)

    def replace(self, name: str, weight: Tensor) -> None:
        """Give the weight, as the module stores it, that later layers see instead of the original one.

        Raises:
            ConfigError: for a layer that is not in the current group, or a weight of another shape.
        """
        if name not in self._open:
            raise ConfigError(
                f"{name} cannot be replaced now, expected a layer of the current group and propagate=True"
            )
        original: Any = self._targets[name].weight
        expected = tuple(original.shape)
        if tuple(weight.shape) != expected:
            raise ConfigError(f"{name} was given a weight of shape {tuple(weight.shape)}, expected {expected}")
        self._replaced[name] = weight.detach().to(self.dtype)

    # --- the passes

    def _start(self) -> None:
        head = head_name(self._model, self._targets)
        skipped = [*self._blocks, *([head] if head else [])]
        self._weights.load(self._weights.outside(skipped))
        if head:
            self._model.get_submodule(head).forward = _stop
        self._intercept(self._suspend)
        passes = 2 if self.propagate else 1
        self._drivers = [Driver(partial(self._model, **batch.inputs)) for batch in self._batches * passes]
        start_all(self._drivers, self._hold)

    @staticmethod
    def _suspend(block: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        driver = current_driver()
        if driver is None:
            return forward(*args, **kwargs)
        call = Call(block, args, kwargs)
        del args, kwargs
        return driver.suspend(call)

    def _waiting(self) -> str | None:
        """The block in front of which the first unfinished pass waits."""
        return next((d.call.block for d in self._drivers if d.call is not None), None)

    @contextmanager
    def _held(self, position: int) -> Iterator[Driver]:
        """A pass whose tensors are in memory."""
        self._spill.restore(position)
        yield self._drivers[position]
        self._hold(position)

    # --- one block

    def _rows(self, batch: Batch, call: Call) -> Rows:
        encoder, main = batch.masks_for(call.block)
        return Rows(main, encoder, tensors_of(call))

    @torch.no_grad()
    def _run(self, call: Call) -> Any:
        return self._model.get_submodule(call.block)(*call.args, **call.kwargs)

    def _pass(self, block: str, stream: int, collectors: Sequence[Collector | ExpertCollector] = ()) -> None:
        """Run the block for every batch that waits in front of it."""
        for index, batch in enumerate(self._batches):
            position = stream * len(self._batches) + index
            driver = self._drivers[position]
            if driver.call is None or driver.call.block != block:
                continue
            with self._held(position):
                with ExitStack() as stack:
                    rows = self._rows(batch, driver.call)
                    for collector in collectors:
                        stack.enter_context(collector.run(rows))
                    output = self._run(driver.call)
                del rows
                driver.resume(output)
                del output
            self.progress(block, batch.tokens)

    def _collected(self, block: str, targets: dict[str, nn.Module]) -> Iterator[Group]:
        collector, experts = Collector(targets, full=self.full), self._experts_of.get(block)
        collectors: list[Collector | ExpertCollector] = [collector]
        if experts is not None:
            collectors.append(experts)
        while self._waiting() == block:
            self._pass(block, 0, collectors)
        for names, statistics in collector.results():
            yield Group(names, partial(identity, statistics))
        for name, (together, each) in experts.results().items() if experts is not None else ():
            yield Group((name,), partial(identity, together), each)

    def _paired(self, block: str, targets: dict[str, nn.Module]) -> Iterator[Group]:
        if targets:
            for names, calls in self._structure(block, targets):
                self._open = set(names)
                group = Group(names, partial(self._compare, block, names, calls))
                yield group
                missing = [n for n in names if n not in self._replaced]
                if missing:
                    raise ConfigError(f"{missing[0]} was not replaced, expected replace() for every layer of its group")
                group._compute = _too_late
        self._open = set()
        while self._waiting() == block:
            self._pass(block, 0)
            with self._replacements():
                self._pass(block, 1)

    def _structure(self, block: str, targets: dict[str, nn.Module]) -> list[tuple[tuple[str, ...], int | None]]:
        """Groups of targets in the order of their first call, and how often they are called, as the first batch shows.

        A target that the first batch does not call is a group of its own, with an unknown number of calls.
        """
        calls_of = [driver.call for driver in self._drivers[: len(self._batches)]]
        index = next(i for i, call in enumerate(calls_of) if call is not None and call.block == block)
        trace = Trace()
        with self._held(index) as driver, watching(targets, lambda name, x: _ignore(trace.enter(name, x))):
            assert driver.call is not None
            self._run(copied(driver.call, self._batches[index].rows))
        known: list[tuple[tuple[str, ...], int | None]] = []
        known += [(names, len(trace.slots[names[0]])) for names in grouped(trace.slots)]
        return known + [((name,), None) for name in targets if name not in trace.slots]

    def _compare(self, block: str, names: tuple[str, ...], calls: int | None) -> InputStatistics:
        """E[x xᵀ] and E[(x̂ - x) xᵀ] of one group, from a run of the block up to it in either pass."""
        name = names[0]
        moment = Moment(in_features(self._targets[name]), full=self.full, drift=self.full)
        for index, batch in enumerate(self._batches):
            original = self._inputs(block, 0, index, batch, name, calls)
            with self._replacements():
                got = self._inputs(block, 1, index, batch, name, calls)
            for position, (rows, weight, placed) in enumerate(got):
                twin = original[position][0] if position < len(original) else None
                # routed rows cannot be matched: another choice of expert brings other tokens
                comparable = placed and twin is not None and twin.shape == rows.shape
                moment.add(name, rows, weight, twin if comparable else None)
        result = combine([moment])
        del moment
        return_memory()
        return result

    def _inputs(
        self, block: str, stream: int, index: int, batch: Batch, name: str, calls: int | None
    ) -> list[tuple[Tensor, int, bool]]:
        found: list[tuple[Tensor, int, bool]] = []
        with self._held(stream * len(self._batches) + index) as driver:
            if driver.call is None or driver.call.block != block:
                return found
            call = copied(driver.call, batch.rows)
            rows = self._rows(batch, call)

            def seen(_: str, x: Tensor) -> None:
                selected, weight, placed = rows.select(x)
                found.append((selected.clone(), weight, placed))
                if len(found) == calls:
                    raise _Reached

            try:
                with watching({name: self._targets[name]}, seen):
                    self._run(call)
            except _Reached:
                pass
        return found

    @contextmanager
    def _replacements(self) -> Iterator[None]:
        originals = {name: self._targets[name]._parameters["weight"] for name in self._replaced}
        try:
            for name, weight in self._replaced.items():
                self._targets[name]._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
            yield
        finally:
            for name, original in originals.items():
                self._targets[name]._parameters["weight"] = original


def _stop(*args: Any, **kwargs: Any) -> Any:
    raise Stop


def _ignore(value: object) -> None:
    return None


def _too_late() -> InputStatistics:
    raise ConfigError("the statistics of a group were asked for after it was replaced, expected the other order")
