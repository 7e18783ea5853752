"""Second moments of a layer's inputs, summed batch by batch.

Products are formed in the inputs' dtype and summed over batches in float64: a float32 sum over many batches would need a
compensation of the same size, so float64 costs no more memory and stays exact for any amount of text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from loftq.errors import SourceError
from loftq.solver.importance import InputStatistics

Scratch = dict[tuple[int, torch.dtype], Tensor]


class Moment:
    """Running sums of x xᵀ, \\|x\\| and, behind quantized layers, (x̂ - x) xᵀ over the rows x of one input.

    Args:
        features: length of x.
        full: the whole matrix, or its diagonal only.
        drift: sum (x̂ - x) xᵀ as well.
        scratch: memory for products, which several moments may share.
    """

    def __init__(
        self, features: int, *, full: bool = True, drift: bool = False, scratch: Scratch | None = None
    ) -> None:
        self._scratch: Scratch = {} if scratch is None else scratch
        shape = (features, features) if full else (features,)
        self.full = full
        self.second = torch.zeros(shape, dtype=torch.float64)
        self.absolute = torch.zeros(features, dtype=torch.float64)
        self.drift = torch.zeros(features, features, dtype=torch.float64) if drift else None
        self.count = 0

    def add(self, name: str, rows: Tensor, weight: int = 1, reference: Tensor | None = None) -> None:
        """Add the rows (n, features), each counted ``weight`` times.

        ``reference`` (n, features) holds x̂. Without it the rows count as equal to the full-precision model's.

        Raises:
            SourceError: NaN or infinite elements; ``name`` is the layer in the message.
        """
        absolute = rows.abs().sum(0, dtype=torch.float64)
        if not torch.isfinite(absolute).all():
            raise SourceError(
                f"the inputs of {name} have NaN or infinite elements on the calibration text, expected finite numbers; "
                f"check the source checkpoint"
            )
        self.absolute.add_(absolute, alpha=weight)
        if self.full:
            self.second.add_(self._product(rows, rows), alpha=weight)
        else:
            self.second.add_(rows.square().sum(0, dtype=torch.float64), alpha=weight)
        if self.drift is not None and reference is not None:
            self.drift.add_(self._product(reference - rows, rows), alpha=weight)
        self.count += weight * rows.shape[0]

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """leftᵀ right, in memory that the next product overwrites."""
        key = (left.shape[1], left.dtype)
        if key not in self._scratch:
            self._scratch[key] = torch.empty(left.shape[1], left.shape[1], dtype=left.dtype)
        return torch.mm(left.T, right, out=self._scratch[key])


def unseen(features: int) -> InputStatistics:
    """What is known of a layer that the calibration text never reached."""
    return InputStatistics(torch.zeros(features), mean_abs=torch.zeros(features), tokens=0)


def combine(moments: Sequence[Moment]) -> InputStatistics:
    """The means over all rows of several inputs together, in float32."""
    first = moments[0]
    count = sum(m.count for m in moments)
    if count == 0:
        return unseen(first.absolute.numel())

    def mean(sums: list[Tensor]) -> Tensor:
        total = sums[0].clone() if len(sums) > 1 else sums[0]
        for other in sums[1:]:
            total += other
        return torch.div(total, count, out=torch.empty(total.shape))

    drifts = [m.drift for m in moments if m.drift is not None]
    return InputStatistics(
        second_moment=mean([m.second for m in moments]),
        mean_abs=mean([m.absolute for m in moments]),
        tokens=count,
        drift=mean(drifts) if drifts else None,
    )


class Rows:
    """Which rows of a layer's input are tokens of the text, in one batch.

    Args:
        mask: (batch, tokens) bool, true for a token, of the stack that the layer belongs to.
        encoder_mask: the encoder's, for a layer of a decoder that reads the encoder's output.
        arguments: the tensors that the layer's block was called with, the hidden states first.
    """

    def __init__(self, mask: Tensor, encoder_mask: Tensor | None = None, arguments: Iterable[Tensor] = ()) -> None:
        self.mask = mask
        self.encoder_mask = encoder_mask
        # by storage, because layers often get a view of what their block got
        self._side = {a.untyped_storage()._cdata: a for a in list(arguments)[1:] if a.is_floating_point()}

    def select(self, x: Tensor, layer_input: Tensor | None = None) -> tuple[Tensor, int, bool]:
        """(n, features) rows of ``x``, how often each counts, and whether they are at known places of the text.

        ``x`` is a layer's input, or a tensor with one row for each of ``layer_input``.

        An input without a batch dimension (DeBERTa's relative positions) serves every window of the batch and counts
        once for each, so that the result does not depend on how windows are batched.
        """
        features = x.shape[-1]
        side = self._side.get((x if layer_input is None else layer_input).untyped_storage()._cdata)
        if side is not None and side.dim() == 2 and side.shape != self.mask.shape:
            return x.reshape(-1, features), self.mask.shape[0], True
        masks = [self.mask] if self.encoder_mask is None else [self.mask, self.encoder_mask]
        if side is not None and self.encoder_mask is not None:
            masks.reverse()
        for mask in masks:
            if x.dim() >= 3 and x.shape[:2] == mask.shape:
                return x[mask].reshape(-1, features), 1, True
        for mask in masks:
            if x.dim() == 2 and x.shape[0] == mask.numel():
                return x[mask.flatten()], 1, True
            if x.dim() == 4 and (x.shape[0], x.shape[2]) == mask.shape:
                return x.transpose(1, 2)[mask].reshape(-1, features), 1, True
        if x.dim() >= 3 and x.shape[0] == 1:
            return x.reshape(-1, features), self.mask.shape[0], True
        pooled = x.dim() == 2 and x.shape[0] == self.mask.shape[0]
        return x.reshape(-1, features), 1, pooled
