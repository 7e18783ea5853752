"""Which module's weight a tensor of the source is, by transformers' own renaming rules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from loftq.errors import SourceError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def architecture(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The first class that the config names and transformers has."""
    import transformers

    names = list(getattr(config, "architectures", None) or [])
    return next((getattr(transformers, n) for n in names if hasattr(transformers, n)), None)


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The architecture the config names, on the meta device: modules and shapes, no weights.

    Raises:
        SourceError: if the config names no architecture that transformers can build.
    """
    import transformers

    try:
        cls = architecture(config)
        with torch.device("meta"):
            if cls is not None:
                return cls(config).eval()
            if config.architectures:
                raise ValueError(f"transformers has no {config.architectures[0]}")
            return transformers.AutoModel.from_config(config, trust_remote_code=False).eval()
    except Exception as error:
        raise SourceError(
            f"cannot build the model of type {getattr(config, 'model_type', '?')!r} ({first_line(error)}); expected an "
            f"architecture of the installed transformers, check config.json or update transformers"
        ) from None


def model_names(model: PreTrainedModel, source_names: Iterable[str]) -> dict[str, str]:
    """Source tensor name -> name in the model's state dict, for the tensors that the model has under one name.

    A tensor that the model does not know, or that transformers assembles from several (fused experts), is left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    known = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    result = {}
    for source_name in source_names:
        name, converter = rename_source_key(source_name, renamings, converters, model.base_model_prefix, known)
        if converter is None and name in known:
            result[source_name] = name
    return result


def missing_parameters(model: PreTrainedModel, names: Mapping[str, str], source_names: Iterable[str]) -> set[str]:
    """Parameters that no tensor of the source provides; ``names`` is the result of :func:`model_names`.

    Tied parameters count with the one they share their weight with. Nothing is said of those that transformers may
    assemble from several tensors, since these have other names in the source.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    converters = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightConverter)]
    assembled = set()
    if set(source_names) - set(names):
        assembled = {pattern.rpartition(".")[2] for c in converters for pattern in c.target_patterns}
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    optional = [*(model._keys_to_ignore_on_load_missing or ())]
    present = set(names.values())
    present |= {k for pair in tied.items() for k in pair if present.intersection(pair)}
    return {
        name
        for name, _ in model.named_parameters()
        if name not in present
        and name.rpartition(".")[2] not in assembled
        and not any(re.search(pattern, name) for pattern in optional)
    }


def unread_tensors(model: PreTrainedModel, unknown: Iterable[str]) -> list[str]:
    """Of the tensors that the model does not know, those that transformers would be surprised by."""
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    return [name for name in unknown if not any(re.search(pattern, name) for pattern in ignored)]
