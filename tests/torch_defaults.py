"""Another default dtype or device of torch's for a while, as a caller may have set it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

DEFAULTS = [torch.float64, torch.bfloat16, torch.device("meta")]


@contextmanager
def torch_default(default: torch.dtype | torch.device) -> Iterator[None]:
    if isinstance(default, torch.device):
        with default:
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
