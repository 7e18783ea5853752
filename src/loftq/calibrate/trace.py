"""Which layers get the same input: recognised by the tensor they are called with, not by their names."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from loftq.calibrate.moments import Moment, Rows, Scratch, combine
from loftq.errors import ConfigError, SourceError
from loftq.modules.linear import is_transposed
from loftq.solver.importance import InputStatistics

Seen = Callable[[str, Tensor], None]


class Slot(NamedTuple):
    """The n-th input of a layer, and of all that share it: the layer that is called first gives the name."""

    name: str
    call: int


def check_targets(model: nn.Module, targets: Iterable[str]) -> dict[str, nn.Module]:
    """Name -> module of every target.

    Raises:
        ConfigError: a name that the model does not have, or that is no linear layer.
    """
    modules = dict(model.named_modules())
    found = {}
    for name in targets:
        module = modules.get(name)
        if module is None:
            raise ConfigError(f"{type(model).__name__} has no module {name!r}, expected the name of a linear layer")
        if not isinstance(module, nn.Linear) and not is_transposed(module):
            raise ConfigError(
                f"{name!r} is a {type(module).__name__}, expected a linear layer; leave it out of the calibration"
            )
        found[name] = module
    return found


def in_features(module: nn.Module) -> int:
    """Length of a linear layer's input."""
    weight: Any = module.weight
    return int(weight.shape[0 if is_transposed(module) else 1])


@contextmanager
def watching(modules: Mapping[str, nn.Module], seen: Seen) -> Iterator[None]:
    """Call ``seen(name, input)`` before each call of one of ``modules``."""

    def hook(name: str) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen(name, args[0] if args else next(iter(kwargs.values())))

        return before

    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Trace:
    """The inputs that were seen during one run."""

    def __init__(self) -> None:
        self.slots: dict[str, list[Slot]] = {}
        self._seen: list[tuple[weakref.ref[Tensor], int, Slot]] = []

    def enter(self, name: str, x: Tensor) -> tuple[Slot, bool]:
        """The slot of this call's input, and whether it is a new one."""
        calls = self.slots.setdefault(name, [])
        # the version counts writes in place: another content is another input
        found = next((s for ref, version, s in self._seen if ref() is x and version == x._version), None)
        slot = found or Slot(name, len(calls))
        if found is None:
            self._seen.append((weakref.ref(x), x._version, slot))
        calls.append(slot)
        return slot, found is None


def grouped(slots: Mapping[str, list[Slot]]) -> list[tuple[str, ...]]:
    """Layers with the same inputs, in the order of their first call."""
    groups: dict[tuple[Slot, ...], list[str]] = {}
    for name, calls in slots.items():
        groups.setdefault(tuple(calls), []).append(name)
    return [tuple(names) for names in groups.values()]


class Collector:
    """Moments of the inputs of several layers, over many runs; a shared input is summed once."""

    def __init__(self, modules: Mapping[str, nn.Module], *, full: bool) -> None:
        self.modules = modules
        self.full = full
        self._moments: dict[Slot, Moment] = {}
        self._slots: dict[str, list[Slot]] = {}
        self._scratch: Scratch = {}

    @contextmanager
    def run(self, rows: Rows | Callable[[str], Rows]) -> Iterator[None]:
        """Collect from what runs inside, which is one batch; ``rows`` may depend on the layer's name."""
        trace = Trace()

        def seen(name: str, x: Tensor) -> None:
            slot, new = trace.enter(name, x)
            if new:
                moment = self._moments.get(slot)
                if moment is None:
                    moment = self._moments[slot] = Moment(
                        in_features(self.modules[name]), full=self.full, scratch=self._scratch
                    )
                selected, weight, _ = (rows if isinstance(rows, Rows) else rows(name)).select(x.detach())
                moment.add(name, selected, weight)

        with watching(self.modules, seen):
            yield
        for name, calls in trace.slots.items():
            known = self._slots.setdefault(name, calls)
            shorter = min(len(known), len(calls))
            if known[:shorter] != calls[:shorter]:
                raise SourceError(
                    f"{name} shares its input with other layers in some batches and not in others, expected the same in "
                    f"all; leave it out of the calibration"
                )
            if len(calls) > len(known):
                self._slots[name] = calls

    def results(self) -> list[tuple[tuple[str, ...], InputStatistics]]:
        """Layers with one input, and its statistics, in the order of the first call; sums are given up on the way."""
        self._scratch.clear()
        uses: dict[Slot, int] = {}
        groups = grouped(self._slots)
        for names in groups:
            for slot in set(self._slots[names[0]]):
                uses[slot] = uses.get(slot, 0) + 1
        results = []
        for names in groups:
            slots = dict.fromkeys(self._slots[names[0]])
            results.append((names, combine([self._moments[s] for s in slots])))
            for slot in slots:
                uses[slot] -= 1
                if not uses[slot]:
                    del self._moments[slot]
        self._slots = {}
        return results
