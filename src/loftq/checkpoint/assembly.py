"""Parameters that transformers assembles from several tensors of a checkpoint, such as the experts of one layer."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from loftq.checkpoint.naming import model_names
from loftq.checkpoint.source import Source
from loftq.errors import SourceError, first_line


class Assembly:
    """The rules by which a model's parameters come from several tensors of a source; they are transformers' own.

    Args:
        source, model: the checkpoint, and its architecture. dtype: of the parameters; by default that of the source.

    Attributes:
        recipe: parameter name -> key of its rule.
    """

    def __init__(self, source: Source, model: Any, dtype: torch.dtype | None = None) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self._source = source
        self._model = model
        self._dtype = dtype
        known = model.state_dict()
        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        self._rules: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
        self.recipe: dict[str, str] = {}
        for name in sorted(source.tensors, key=_natural) if converters else ():
            target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
            if pattern is None or target not in known:
                continue
            rule = by_pattern[pattern]
            self._rules.setdefault(target, (rule, []))[1].append((name, pattern))
            for other in rule.target_patterns:
                self.recipe[target.replace(rule.target_patterns[0], other)] = target

    def make(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """The parameters of the rules that give ``keys``.

        Raises:
            SourceError: tensors that do not fit together.
        """
        made: dict[str, Tensor] = {}
        for first in dict.fromkeys(self.recipe[key] for key in keys):
            made.update(self._convert(first, *self._rules[first]))
        return made

    def parts(self, key: str) -> list[str]:
        """The source's tensors that a parameter is made of, in order."""
        return [name for name, _ in self._rules[self.recipe[key]][1]]

    def expert(self, key: str, expert: int, experts: int) -> Tensor:
        """The matrix of one of so many experts in a parameter, from the tensors of that expert alone where the rule allows.

        Raises:
            SourceError: tensors that do not fit together, or not one of each kind for every expert.
        """
        first = self.recipe[key]
        rule, parts = self._rules[first]
        if not _is_stack(rule):
            return self._convert(first, rule, parts)[key][expert].clone()
        by_pattern: dict[str, list[tuple[str, str]]] = {}
        for part in parts:
            by_pattern.setdefault(part[1], []).append(part)
        for pattern, found in by_pattern.items():
            if len(found) != experts:
                raise SourceError(
                    f"the checkpoint has {len(found)} tensors {pattern} for the {experts} experts of {key}; fetch it again, "
                    f"or correct the number of experts in config.json"
                )
        return self._convert(first, rule, [found[expert] for found in by_pattern.values()])[key][0]

    def _convert(self, first: str, rule: Any, parts: list[tuple[str, str]]) -> dict[str, Tensor]:
        converter = copy.deepcopy(rule)
        for name, pattern in parts:
            tensor = self._source.read(name)
            converter.add_tensor(first, name, pattern, tensor if self._dtype is None else tensor.to(self._dtype))
        try:
            result = converter.convert(first, model=self._model, config=self._model.config)
        except Exception as error:
            raise SourceError(
                f"the {len(parts)} tensors of {first} do not fit together ({first_line(error)}); fetch the checkpoint again"
            ) from None
        return {name: t[0] if isinstance(t, list) else t for name, t in result.items()}


def _is_stack(rule: Any) -> bool:
    """Whether a rule stacks tensors and from then on leaves the first dimension alone: it is the same for one expert."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    first, *rest = rule.operations
    stacks = isinstance(first, MergeModulelist) and first.dim == 0
    return stacks and all(isinstance(step, Concatenate) and step.dim > 0 for step in rest)


class Parameters:
    """A model's parameters by their own names, read from a source that may hold them under other names or in parts.

    Attributes:
        names: the source's tensor -> the parameter that it is, see :func:`loftq.checkpoint.naming.model_names`.
    """

    def __init__(self, source: Source, model: Any) -> None:
        self.names = model_names(model, source.tensors)
        self._source = source
        self._own = {parameter: name for name, parameter in self.names.items()}
        self._assembly = Assembly(source, model)

    def parts(self, parameter: str) -> list[str]:
        """The source's tensors that a parameter is made of; none if the source lacks it."""
        if parameter in self._own:
            return [self._own[parameter]]
        return self._assembly.parts(parameter) if parameter in self._assembly.recipe else []

    def nbytes(self, parameter: str) -> int:
        """Bytes of its tensors in the source."""
        return sum(self._source.tensors[name].nbytes for name in self.parts(parameter))

    def read(self, parameter: str, expert: int | None = None, experts: int = 0) -> Tensor:
        """A parameter, or the matrix of one of so many experts in it, of which alone the tensors are read.

        Raises:
            SourceError: the source lacks it, or its tensors do not fit together.
        """
        if parameter in self._own:
            return self._source.read(self._own[parameter], expert)
        if parameter not in self._assembly.recipe:
            raise SourceError(f"{self._source.path} has no {parameter}, expected all of the model's weights")
        if expert is None:
            return self._assembly.make([parameter])[parameter]
        return self._assembly.expert(parameter, expert, experts)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key by which expert 10 comes after expert 9."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"\.", name)]
