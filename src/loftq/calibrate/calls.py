"""The tensors in a block's call and in what it returns: found, copied, taken out and put back."""

from __future__ import annotations

from collections.abc import Iterator
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


class Hole:
    """Stands for a floating-point tensor in the structure of a block's output."""


def structure_of(value: Any) -> Any:
    """A block's output with a :class:`Hole` for each floating-point tensor."""
    if isinstance(value, Tensor):
        return Hole() if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(structure_of, value))
    if isinstance(value, (list, tuple)):
        return type(value)(structure_of(item) for item in value)
    if isinstance(value, dict):
        return type(value)(**{k: structure_of(v) for k, v in value.items()})
    return value


def filled(structure: Any, tensors: Iterator[Tensor]) -> Any:
    """What :func:`structure_of` returned, with tensors for its holes, in the order of :func:`tensors_in`."""
    if isinstance(structure, Hole):
        return next(tensors)
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        return type(structure)(*(filled(item, tensors) for item in structure))
    if isinstance(structure, (list, tuple)):
        return type(structure)(filled(item, tensors) for item in structure)
    if isinstance(structure, dict):
        return type(structure)(**{k: filled(v, tensors) for k, v in structure.items()})
    return structure


def replaced(value: Any, swap: dict[int, Tensor]) -> Any:
    """The structure with some tensors exchanged, and all others cut off from the pass's own graph."""
    if isinstance(value, Tensor):
        return swap.get(id(value), value.detach() if value.requires_grad else value)
    if type(value) in (list, tuple):
        return type(value)(replaced(item, swap) for item in value)
    if type(value) is dict:
        return {k: replaced(v, swap) for k, v in value.items()}
    return value
