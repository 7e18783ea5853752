"""What the passes over a calibration text share: one block's weights in memory, every batch waiting in front of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from loftq.calibrate.batches import make_batches
from loftq.calibrate.blocks import Weights, build
from loftq.calibrate.calls import tensors_in
from loftq.calibrate.drivers import Driver
from loftq.calibrate.spill import Spill, reachable_storages
from loftq.calibrate.text import CalibrationTokens
from loftq.calibrate.trace import check_targets
from loftq.checkpoint.source import Source
from loftq.config import positive_int
from loftq.errors import SourceError

if TYPE_CHECKING:
    from typing_extensions import Self

Advance = Callable[[str, int], None]
T = TypeVar("T")


class Streamed:
    """A model whose blocks are loaded one at a time, and a pass for every batch. A context manager.

    Args:
        source, targets, tokens, batch_tokens, spill_bytes, dtype, progress: see
            :class:`loftq.calibrate.forward.StreamedForward`.
    """

    def __init__(
        self,
        source: Source,
        targets: Collection[str],
        tokens: CalibrationTokens,
        batch_tokens: int,
        spill_bytes: int,
        dtype: torch.dtype,
        progress: Advance,
    ) -> None:
        positive_int("batch_tokens", batch_tokens)
        positive_int("spill_bytes", spill_bytes, 0)
        self.progress = progress
        self.spilled_bytes = 0
        self._model = build(source, dtype)
        self._targets = check_targets(self._model, targets)
        self._batches = make_batches(self._model, tokens, batch_tokens)
        self._weights = Weights(source, self._model, dtype)
        self._spill = Spill(spill_bytes)
        self._blocks: list[str] = []
        self._drivers: list[Driver] = []  # batch by batch; of two passes, those of the second come after the first's
        self._shared: set[int] = set()
        self._loaded: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the passes and remove what was spilled."""
        try:
            for driver in self._drivers:
                driver.stop()  # it unwinds without a look at tensors whose storage may be empty
        finally:
            self._drivers = []
            self.spilled_bytes = self._spill.written
            self._spill.close()

    def _intercept(self, suspend: Callable[..., Any]) -> None:
        """Let every block's ``forward`` call ``suspend(block, forward, ...)`` instead."""
        for block in self._blocks:
            module = self._model.get_submodule(block)
            module.forward = partial(suspend, block, module.forward)

    def _hold(self, position: int) -> None:
        """Spill what the pass waits with, if memory is short."""
        call = self._drivers[position].call
        tensors: list[Tensor] = []
        if call is not None:
            rows = self._batches[position % len(self._batches)].rows
            if position == 0:  # the walk takes milliseconds, and what a model caches it has cached by then
                self._shared = reachable_storages(self._model)
            tensors = [t for t in tensors_in(tuple(call)) if t.dim() > 1 and t.shape[0] == rows]
            tensors = [t for t in tensors if t.untyped_storage()._cdata not in self._shared]
        self._spill.suspend(position, tensors)

    def _load(self, block: str) -> None:
        if self._loaded == block:
            return
        if self._loaded is not None:
            self._weights.unload(self._weights.under([self._loaded]))
        self._weights.load(self._weights.under([block]))
        self._loaded = block


def runs_again(block: str) -> SourceError:
    """The refusal of a model that comes back to a block whose weights have been given up."""
    return SourceError(
        f"{block} runs again after other blocks, expected every block once or several times in a row; leave its layers out "
        f"of the calibration"
    )


def within(block: str, named: Mapping[str, T]) -> dict[str, T]:
    """What is in a block, or is it."""
    return {name: value for name, value in named.items() if name == block or name.startswith(f"{block}.")}
