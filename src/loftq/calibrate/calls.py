"""The tensors in a block's call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from loftq.calibrate.drivers import Call


def tensors_of(call: Call) -> list[Tensor]:
    """The tensors that a block was called with, those inside lists and mappings too."""
    return tensors_in((call.args, call.kwargs))


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in lists, tuples and mappings, in order."""
    found: list[Tensor] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[Tensor]) -> None:
    # a function of its own: one that closes over `found` and itself would keep the tensors until a garbage collection
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, found)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _collect(item, found)


def copied(call: Call, rows: int) -> Call:
    """The call with hidden states of its own: a block may write into them, and it will be called with them again."""
    copies: dict[int, Tensor] = {}
    return Call(call.block, _copy(call.args, rows, copies), _copy(call.kwargs, rows, copies))


def _copy(value: Any, rows: int, copies: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3 and value.shape[0] == rows:
        if id(value) not in copies:
            copies[id(value)] = value.clone()
        return copies[id(value)]
    if type(value) in (list, tuple):
        return type(value)(_copy(item, rows, copies) for item in value)
    return {k: _copy(v, rows, copies) for k, v in value.items()} if type(value) is dict else value
