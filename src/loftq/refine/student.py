"""The quantized model while it is tuned: loading it, what is trained in it, and what it turns into."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loftq.checkpoint.assembly import Parameters
from loftq.checkpoint.naming import meta_model
from loftq.checkpoint.source import SafetensorsSource, Source
from loftq.errors import ConfigError
from loftq.hub.adapter import ADAPTER_WEIGHTS, INIT_DIR, tensor_names
from loftq.refine.layers import Adapted, AdaptedEmbedding, AdaptedExperts, AdaptedLinear, adapted_model
from loftq.report.memory.training import folder_plans
from loftq.report.record import QuantizationReport


def load_student(
    folder: Path, report: QuantizationReport, dtype: torch.dtype, device: str
) -> tuple[nn.Module, dict[str, Adapted]]:
    """The quantized model in ``dtype`` and its adapted layers by name.

    Their backbone is dense where that takes at most half of the memory that is free, and packed otherwise.
    """
    from loftq.hub.load import load

    wrapped = load(folder, dtype=dtype).to(device)
    file = SafetensorsSource(folder / INIT_DIR, single=ADAPTER_WEIGHTS)
    factors = {}
    for name, plan in folder_plans(folder).items():
        a, b = tensor_names(plan)
        if a in file.tensors and b in file.tensors:
            factors[name] = (file.read(a).to(device), file.read(b).to(device))
    dense = sum(m.numel for m in report.modules) * dtype.itemsize <= free_bytes(device) // 2
    student, layers = adapted_model(wrapped, factors, dtype, dense)
    student.config.use_cache = False  # type: ignore[union-attr]
    return student.eval().requires_grad_(False), layers


def trainable(student: nn.Module, layers: Mapping[str, Adapted], scales: bool) -> dict[str, nn.Parameter]:
    """What is trained, by name. Not an adapter of the output layer, whose logits are never whole.

    Raises:
        ConfigError: ``scales`` are asked for, and a module has none of its own.
    """
    head = output_layer(student)
    parameters: dict[str, nn.Parameter] = {}
    for name, layer in layers.items():
        if layer is head:
            continue
        parameters[f"{name}.lora_A"], parameters[f"{name}.lora_B"] = layer.lora_A, layer.lora_B
        if scales and isinstance(layer, AdaptedLinear):
            if not layer.frozen.has_float_scales:
                raise ConfigError(
                    f"{name} has scales in 8 bits (double_quant), which cannot be tuned; leave out --scales"
                )
            layer.train_scales()
            assert layer.factor is not None
            parameters[f"{name}.factor"] = layer.factor
    for p in parameters.values():
        p.requires_grad_(False)
    return parameters


def output_layer(model: Any) -> nn.Module | None:
    """The layer that gives the logits."""
    layer: nn.Module | None = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return layer


def new_tensors(folder: Path, layers: Mapping[str, Adapted]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """New values of the adapter's and of the backbone's tensors, under their names in the files of ``folder``."""
    plans = folder_plans(folder)
    adapter: dict[str, Tensor] = {}
    backbone: dict[str, Tensor] = {}
    for name, layer in layers.items():
        a, b = tensor_names(plans[name])
        adapter[a], adapter[b] = layer.lora_A.detach(), layer.lora_B.detach()
        if isinstance(layer, AdaptedLinear) and layer.factor is not None:
            backbone[f"{name}.weight_scale"] = layer.frozen.new_scale(layer.factor)
    return adapter, backbone


@torch.no_grad()
def weight_errors(source: Source, folder: Path, layers: Mapping[str, Adapted]) -> dict[str, float]:
    """Module name -> |W − Q − scaling · B A| / |W| in the Frobenius norm, for linear layers and experts."""
    parameters = Parameters(source, meta_model(source.config()))
    errors = {}
    for name, plan in folder_plans(folder).items():
        layer = layers.get(name)
        if layer is None or isinstance(layer, AdaptedEmbedding) or not parameters.parts(plan.parameter):
            continue
        missed, size = 0.0, 0.0
        for number, matrix in enumerate(plan.matrices()):
            weight = parameters.read(plan.parameter, number if plan.experts else None, plan.experts).float()
            if isinstance(layer, AdaptedExperts):
                approximation = layer.exact(number)
            else:
                approximation = layer.frozen.exact(layer.factor) + layer.scaling * (layer.lora_B @ layer.lora_A)
            residual = (weight.T if matrix.kind == "conv1d" else weight) - approximation.cpu()
            missed = math.hypot(missed, float(torch.linalg.vector_norm(residual)))
            size = math.hypot(size, float(torch.linalg.vector_norm(weight)))
        errors[name] = missed / size if size else 0.0
    return errors


@torch.no_grad()
def round_factors(layers: Mapping[str, Adapted]) -> None:
    """Make every factor one whose product with the stored scale is exact in the stored dtype."""
    for layer in layers.values():
        if isinstance(layer, AdaptedLinear) and layer.factor is not None:
            layer.factor.copy_(layer.frozen.exact_factor(layer.factor))


def dtype_name(name: str) -> str:
    """What ``auto`` stands for: bfloat16 where products in it are fast."""
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    flags = Path("/proc/cpuinfo")
    fast = flags.exists() and any(f in flags.read_text(errors="replace") for f in ("avx512_bf16", "amx_bf16", " bf16"))
    return "bfloat16" if fast else "float32"


def free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    import psutil

    return int(psutil.virtual_memory().available)
