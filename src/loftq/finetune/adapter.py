"""A quantized folder's adapter in the model of a task, whose modules may have other names than in the folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from loftq.checkpoint.source import SafetensorsSource
from loftq.errors import ConfigError, SourceError
from loftq.hub.adapter import ADAPTER_WEIGHTS, INIT_DIR, auto_mapping, tensor_names
from loftq.hub.backbone import adapter_config
from loftq.hub.quantizer import find_name
from loftq.plan.targets import ModulePlan, minimal_target_names, minimal_target_parameters
from loftq.report.record import QuantizationReport

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

TASK_TYPES = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
}


def module_names(report: QuantizationReport, model: PreTrainedModel) -> dict[str, str]:
    """Module name in the folder -> its name in a model of the same base with another head.

    A part of the base that the model's class leaves out as a whole, as models for question answering do with BERT's pooler,
    has no name.

    Raises:
        SourceError: a module that the model does not have, though it has what the module is a part of.
    """
    modules = {n for n, _ in model.named_modules()} | {n for n, _ in model.named_parameters()}
    prefix = model.base_model_prefix
    shared = {n.removeprefix(prefix + ".").partition(".")[0] for n in modules}
    found = {}
    for record in report.modules:
        name = find_name(record.name, modules, prefix)
        if name is None:
            part = record.name.removeprefix(prefix + ".").partition(".")[0]
            if part not in shared:
                continue
            raise SourceError(
                f"{type(model).__name__} has no module {record.name}, which the quantized folder holds; expected a model of "
                f"the same architecture"
            )
        found[record.name] = name
    if not found:
        raise SourceError(
            f"{type(model).__name__} has none of the quantized folder's modules, such as {report.modules[0].name}; expected a "
            f"model of the same architecture"
        )
    return found


def task_lora_config(
    folder: Path,
    names: Mapping[str, str],
    model: PreTrainedModel,
    auto_class: str,
    heads: list[str],
    *,
    lora_dropout: float | None = None,
    use_dora: bool = False,
) -> LoraConfig:
    """The folder's LoRA config for the model of a task: same modules, ranks and alphas; heads are trained beside them."""
    from peft import LoraConfig

    stored = adapter_config(folder / INIT_DIR)
    lacking = [name for name in ("r", "lora_alpha") if not isinstance(stored.get(name), (int, float))]
    if lacking:
        raise SourceError(
            f"{folder / INIT_DIR}'s config lacks {lacking[0]}, expected the fitted adapter's; quantize again"
        )
    plans = _plans(folder, names)
    has_experts = any(plan.experts for plan in plans.values())
    dropout = stored.get("lora_dropout", 0.0) if lora_dropout is None else lora_dropout
    if has_experts and (dropout or use_dora):
        raise ConfigError(
            f"{'use_dora is on' if use_dora else f'lora_dropout is {dropout}'}, but {folder} has an adapter on experts, with "
            f"which PEFT has neither DoRA nor dropout; turn it off, or quantize without the experts (exclude_modules)"
        )
    patterns = {
        key: {names.get(n, n): v for n, v in (stored.get(key) or {}).items()}
        for key in ("rank_pattern", "alpha_pattern")
    }
    return LoraConfig(
        r=stored["r"],
        lora_alpha=stored["lora_alpha"],
        use_rslora=stored.get("use_rslora", False),
        lora_dropout=dropout,
        target_modules=minimal_target_names({n for n, plan in plans.items() if not plan.experts}, model),
        target_parameters=minimal_target_parameters(plans.values(), model) if has_experts else None,
        task_type=TASK_TYPES[auto_class],
        auto_mapping=auto_mapping(model),
        modules_to_save=list(heads) or None,
        use_dora=use_dora,
        **patterns,
    )


def _plans(folder: Path, names: Mapping[str, str]) -> dict[str, ModulePlan]:
    """The folder's modules by their names in the model."""
    from loftq.report.memory.training import folder_plans

    known = folder_plans(folder)
    return {own: replace(known[recorded], name=own) for recorded, own in names.items()}


def load_factors(model: PeftModel, folder: Path, names: Mapping[str, str]) -> None:
    """Put the folder's fitted A and B into the model's adapter.

    Raises:
        SourceError: the adapter's file lacks a module's factors, or they have another shape.
    """
    source = SafetensorsSource(folder / INIT_DIR, single=ADAPTER_WEIGHTS)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for (recorded, _), plan in zip(names.items(), _plans(folder, names).values(), strict=True):
            for stored, target in zip(tensor_names(replace(plan, name=recorded)), tensor_names(plan), strict=True):
                own, leaf = target.removesuffix(".weight"), ".weight" if target.endswith(".weight") else ""
                target = f"{own}.default{leaf}"
                if stored not in source.tensors or target not in parameters:
                    raise SourceError(f"{source.path} has no {stored}, expected the fitted adapter; quantize again")
                tensor = source.read(stored)
                if tensor.shape != parameters[target].shape:
                    raise SourceError(
                        f"{stored} in {source.path} is {tuple(tensor.shape)}, expected {tuple(parameters[target].shape)}; "
                        f"quantize again"
                    )
                parameters[target].copy_(tensor)
    reset_magnitudes(model)


def reset_magnitudes(model: nn.Module) -> None:
    """DoRA's magnitudes for the factors as they are now: m = ‖Q + scaling · B A‖ row by row, so that nothing changes yet."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight

    for module in model.modules():
        if not isinstance(module, LoraLayer) or not len(getattr(module, "lora_magnitude_vector", {})):
            continue
        for name, vector in module.lora_magnitude_vector.items():
            weight: Tensor = dequantize_module_weight(module.get_base_layer()).float()
            lora_A, lora_B = module.lora_A[name].weight.float(), module.lora_B[name].weight.float()
            whole = weight + module.scaling[name] * (lora_B @ lora_A)
            with torch.no_grad():
                vector.weight.copy_(torch.linalg.norm(whole, dim=1))


def head_names(model: PreTrainedModel, missing: set[str]) -> list[str]:
    """Modules that the checkpoint does not provide or that lie outside the base model: what a task trains from scratch.

    Args:
        missing: parameters that the checkpoint did not have.
    """
    prefix = model.base_model_prefix
    heads = {n for n, m in model.named_children() if n != prefix and any(True for _ in m.parameters())}
    for name in missing:
        parent = name.rpartition(".")[0]
        if parent and not any(parent == h or parent.startswith(h + ".") for h in heads):
            heads.add(parent)
    return sorted(heads)


def initialise(model: PreTrainedModel, heads: list[str], seed: int) -> None:
    """Give the heads the model's own random initialisation, the same for a seed whatever else the model holds."""
    torch.manual_seed(seed)
    for head in heads:
        for module in model.get_submodule(head).modules():
            for parameter in module.parameters(recurse=False):
                if parameter.is_meta or not torch.is_floating_point(parameter):
                    raise ConfigError(
                        f"{head} of {type(model).__name__} cannot be initialised; it holds no float weights"
                    )
            if getattr(module, "_is_hf_initialized", False):
                module._is_hf_initialized = False
            for parameter in module.parameters(recurse=False):
                if getattr(parameter, "_is_hf_initialized", False):
                    parameter._is_hf_initialized = False
            model._init_weights(module)


def trainable_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable parameters, all parameters and packed weights)."""
    from loftq.modules import PackedModule

    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    packed = sum(m.packed_weights for m in model.modules() if isinstance(m, PackedModule))
    return trainable, sum(p.numel() for p in model.parameters() if p.dtype != torch.uint8) + packed
