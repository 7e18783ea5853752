"""The text a refinement trains on and is judged by: windows of token ids, the last ones held out."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loftq.checkpoint.source import as_bytes
from loftq.errors import SourceError
from loftq.refine.settings import RefineSettings


@dataclass(frozen=True)
class Windows:
    """``ids`` (n, length) int64, ``mask`` (n, length) bool; the last ``held_out`` rows are never trained on."""

    ids: Tensor
    mask: Tensor
    held_out: int
    name: str

    @property
    def train(self) -> range:
        return range(len(self.ids) - self.held_out)

    @property
    def held(self) -> range:
        return range(len(self.ids) - self.held_out, len(self.ids))

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256(memoryview(as_bytes(self.ids.contiguous())))
        digest.update(memoryview(as_bytes(self.mask.contiguous())))
        return digest.hexdigest()

    def batches(self, rows: range | Tensor, batch_tokens: int) -> list[list[int]]:
        """The rows in order, in groups of ``batch_tokens`` tokens and at least one window."""
        size = max(1, batch_tokens // self.ids.shape[1])
        numbers = [int(row) for row in rows]
        return [numbers[start : start + size] for start in range(0, len(numbers), size)]

    def inputs(self, rows: list[int], device: torch.device | str) -> dict[str, Tensor]:
        """Keyword arguments of a transformers model; a mask only where something is masked."""
        values = {"input_ids": self.ids[rows].to(device)}
        if not self.mask[rows].all():
            values["attention_mask"] = self.mask[rows].long().to(device)
        return values

    def targets(self, rows: list[int]) -> Tensor:
        """(rows · length,) the token after each, −1 at the end of a window and where either is masked."""
        ids, mask = self.ids[rows], self.mask[rows]
        targets = torch.full_like(ids, -1)
        targets[:, :-1] = torch.where(mask[:, 1:] & mask[:, :-1], ids[:, 1:], -1)
        return targets.flatten()


DEFAULT_LENGTH = 512


def read_windows(text: Any, out_dir: Path, settings: RefineSettings, model: nn.Module) -> Windows:
    """Windows from the name of a text, from token ids (n, length), or from an object with ``ids`` and ``mask``.

    ``model`` is the full-precision one, which writes the text called ``self``.

    Raises:
        SourceError: no such text, no tokenizer, or fewer than two windows.
    """
    if isinstance(text, (str, Path)):
        from loftq.calibrate.text import calibration_tokens
        from loftq.evaluate.models import default_window, load_tokenizer

        try:
            tokenizer = load_tokenizer(out_dir)
        except SourceError:  # not every text needs one
            tokenizer = None
        text = calibration_tokens(
            str(text),
            tokenizer,
            samples=settings.samples,
            length=default_window(model, settings.length, DEFAULT_LENGTH),
            seed=settings.seed,
            model=model,
        )
    ids = text if isinstance(text, Tensor) else text.ids
    ids = ids.long()
    mask = torch.ones_like(ids, dtype=torch.bool) if isinstance(text, Tensor) else text.mask
    if ids.dim() != 2 or len(ids) < 2 or ids.shape[1] < 2:
        raise SourceError(
            f"the text gives token windows of shape {tuple(ids.shape)}, expected at least 2 windows of 2 tokens, one of "
            f"them to judge by; give a longer text or a smaller length"
        )
    held_out = min(len(ids) - 1, math.ceil(settings.holdout * len(ids)))
    return Windows(ids, mask, held_out, "tokens" if isinstance(text, Tensor) else str(text.name))
