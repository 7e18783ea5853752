"""Parameters that transformers assembles from several tensors of a checkpoint, such as the experts of one layer."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from loftq.checkpoint.source import Source
from loftq.errors import SourceError, first_line


class Assembly:
    """The rules by which a model's parameters come from several tensors of a source; they are transformers' own.

    Attributes:
        recipe: parameter name -> key of its rule.
    """

    def __init__(self, source: Source, model: Any, dtype: torch.dtype) -> None:
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
            rule, parts = self._rules[first]
            converter = copy.deepcopy(rule)
            for name, pattern in parts:
                converter.add_tensor(first, name, pattern, self._source.read(name).to(self._dtype))
            try:
                result = converter.convert(first, model=self._model, config=self._model.config)
            except Exception as error:
                raise SourceError(
                    f"the {len(parts)} tensors of {first} do not fit together ({first_line(error)}); fetch the checkpoint again"
                ) from None
            made.update({name: t[0] if isinstance(t, list) else t for name, t in result.items()})
        return made


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key by which expert 10 comes after expert 9."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"\.", name)]
