"""Bytes of a quantized folder, from the headers of its files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loftq.checkpoint.naming import meta_model
from loftq.checkpoint.source import SafetensorsSource
from loftq.errors import SourceError, first_line
from loftq.hub.adapter import ADAPTER_WEIGHTS, INIT_DIR
from loftq.hub.backbone import read_quantization_config
from loftq.plan.targets import stored_plan
from loftq.report.memory.footprint import Footprint, Part, split_embeddings
from loftq.report.memory.predict import source_dtype

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def folder_config(directory: Path) -> PretrainedConfig:
    """The configuration of a quantized folder's model as it was before quantization.

    Raises:
        SourceError: the folder is no quantized one, or transformers does not know its architecture.
    """
    from transformers import AutoConfig

    read_quantization_config(directory)
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        raise SourceError(
            f"transformers cannot read {directory / 'config.json'} ({first_line(error)}); update transformers"
        ) from None
    del config.quantization_config
    return config


def measure_footprint(directory: str | Path) -> Footprint:
    """What a folder that `loftq quantize` has written takes; only headers are read.

    The dtype of the source, which the pretrained size counts in, is that of most bytes that are not packed.

    Raises:
        SourceError: the folder is no quantized one, or a file is missing or damaged.
    """
    from loftq.hub.quantizer import LoftQQuantizationConfig

    directory = Path(directory)
    modules: dict[str, Any] = read_quantization_config(directory).get("modules") or {}
    if not modules:
        raise SourceError(f"{directory / 'config.json'} lists no packed modules, expected at least one; quantize again")
    config = folder_config(directory)
    model = meta_model(config)
    tensors = SafetensorsSource(directory).tensors
    adapters = SafetensorsSource(directory / INIT_DIR, single=ADAPTER_WEIGHTS).tensors
    plans = []
    for name, spec in LoftQQuantizationConfig(**read_quantization_config(directory)).module_specs().items():
        try:
            plans.append(stored_plan(model, name, spec))
        except AttributeError:
            raise SourceError(
                f"{directory} lists the packed module {name}, which {type(model).__name__} does not have; quantize again"
            ) from None
    weights = sum(plan.numel for plan in plans)
    stored = {name for plan in plans for name in plan.storage()}
    packed = {n: t for n, t in tensors.items() if n in stored}
    unpacked = {n: t for n, t in tensors.items() if n not in packed}
    sizes: Counter[torch.dtype] = Counter()
    for info in unpacked.values():
        if info.dtype.is_floating_point:
            sizes[info.dtype] += info.nbytes
    dtype = sizes.most_common(1)[0][0] if sizes else source_dtype(config)
    embeddings, rest = split_embeddings(unpacked, model)
    return Footprint(
        backbone=Part(weights, sum(info.nbytes for info in packed.values())),
        adapters=Part.of(adapters),
        embeddings=embeddings,
        rest=rest,
        pretrained_bytes=weights * dtype.itemsize + embeddings.nbytes + rest.nbytes,
    )
