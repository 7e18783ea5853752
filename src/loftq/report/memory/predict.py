"""Bytes of a quantized model from its configuration: no weights are read, modules exist on the meta device only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from loftq.checkpoint.naming import meta_model
from loftq.codec.qtensor import TensorInfo
from loftq.config import LoftQConfig, one_of
from loftq.hub.adapter import tensor_layout
from loftq.plan.targets import plan_modules
from loftq.report.memory.footprint import Footprint, Part, split_embeddings

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def source_dtype(config: PretrainedConfig, dtype: str | None = None) -> torch.dtype:
    """``dtype`` by name, else what the config says its checkpoint is in, else float32, transformers' default.

    Raises:
        ConfigError: for another name than float32, float16 or bfloat16.
    """
    if dtype is not None:
        return FLOATS[one_of("dtype", dtype, FLOATS)]
    found = getattr(config, "dtype", None)
    found = FLOATS.get(found, found) if isinstance(found, str) else found
    return found if isinstance(found, torch.dtype) else torch.float32


def predict_footprint(
    config: PretrainedConfig, settings: LoftQConfig, *, dtype: str | None = None, adapter_dtype: str = "float32"
) -> Footprint:
    """What `loftq quantize` would write for a model of this configuration.

    Tensors that several modules share are counted once, as transformers saves them. A checkpoint that holds tensors
    which its model does not know, or some in another dtype, differs by those.

    Args:
        config: of transformers; see :func:`loftq.checkpoint.source.open_config`.
        settings: which modules, bits, block size, codebook and rank; how they are fitted does not matter.
        dtype: of the checkpoint, that is of everything that is not packed; by default the config's.
        adapter_dtype: of A and B; `loftq quantize` writes float32.

    Raises:
        SourceError: transformers cannot build the model.
        ConfigError: a setting selects nothing, or a dtype has another name.
    """
    model = meta_model(config)
    stored = source_dtype(config, dtype)
    factors = FLOATS[one_of("adapter_dtype", adapter_dtype, FLOATS)]
    plans = plan_modules(model, settings).values()
    packed = [info for plan in plans for info in plan.storage().values()]
    adapters = [info.shape for plan in plans for info in tensor_layout(plan).values()]
    weights = sum(plan.numel for plan in plans)
    unpacked = _state_layout(model, stored)
    for plan in plans:
        del unpacked[plan.parameter]
    embeddings, rest = split_embeddings(unpacked, model)
    return Footprint(
        backbone=Part(weights, sum(info.nbytes for info in packed)),
        adapters=Part.of({str(k): TensorInfo(factors, shape) for k, shape in enumerate(adapters)}),
        embeddings=embeddings,
        rest=rest,
        pretrained_bytes=weights * stored.itemsize + embeddings.nbytes + rest.nbytes,
    )


def _state_layout(model: nn.Module, dtype: torch.dtype) -> dict[str, TensorInfo]:
    """The tensors that transformers saves: floating ones in ``dtype``, shared ones once."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {
        name: TensorInfo(dtype if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
