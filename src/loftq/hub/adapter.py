"""The LoRA adapter as PEFT stores it: names of its tensors, its config, and the backbone it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loftq.codec.qtensor import TensorInfo
from loftq.config import LoftQConfig
from loftq.errors import ConfigError
from loftq.modules.experts import fused_experts
from loftq.plan.targets import ModulePlan, minimal_target_names, minimal_target_parameters

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig

INIT_DIR = "loftq_init"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
BACKBONE_KEY = "loftq_backbone_sha256"

_TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "EncoderDecoderModel": "SEQ_2_SEQ_LM",
}


def tensor_names(plan: ModulePlan) -> tuple[str, str]:
    """Names of A and B in PEFT's adapter file."""
    base = f"base_model.model.{plan.adapter}"
    if plan.kind == "embedding":
        return f"{base}.lora_embedding_A", f"{base}.lora_embedding_B"
    return f"{base}.lora_A.weight", f"{base}.lora_B.weight"


def tensor_layout(plan: ModulePlan) -> dict[str, TensorInfo]:
    """Dtypes and shapes of A and B: (r, in) and (out, r); for an embedding (r, num_embeddings), (embedding_dim, r).

    For E experts (r · E, in), one expert's rows after another's, and (out, r · E), where expert e has every E-th column.
    """
    rows, columns = plan.shape
    name_A, name_B = tensor_names(plan)
    if plan.kind == "embedding":
        rows, columns = columns, rows
    rank = plan.rank * max(1, plan.experts)
    return {name_A: TensorInfo(torch.float32, (rank, columns)), name_B: TensorInfo(torch.float32, (rows, rank))}


def adapter_tensors(plan: ModulePlan, lora_A: Tensor, lora_B: Tensor) -> dict[str, Tensor]:
    """A decomposition's factors under PEFT's names.

    PEFT adds ``(B A)ᵀ`` to an embedding's (num_embeddings, embedding_dim) table, so there the factors swap places.
    """
    name_A, name_B = tensor_names(plan)
    if plan.kind == "embedding":
        lora_A, lora_B = lora_B.T, lora_A.T
    return {name_A: lora_A.contiguous(), name_B: lora_B.contiguous()}


def join_experts(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(A, B) of every expert as PEFT keeps those of a parameter: see :func:`tensor_layout`."""
    lora_A, lora_B = zip(*factors, strict=True)
    return torch.cat(lora_A), torch.stack(lora_B, dim=-1).flatten(1)


def split_experts(lora_A: Tensor, lora_B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """A (E, r, in) and B (E, out, r) from what :func:`join_experts` gives; views."""
    return lora_A.unflatten(0, (experts, -1)), lora_B.unflatten(1, (-1, experts)).permute(2, 0, 1)


def matrix_factors(plan: ModulePlan, lora_A: Tensor, lora_B: Tensor) -> list[tuple[Tensor, Tensor]]:
    """A and B of each of :meth:`ModulePlan.matrices`, from the adapter's tensors; of an embedding as they are there."""
    if not plan.experts:
        return [(lora_A, lora_B)]
    return list(zip(*split_experts(lora_A, lora_B, plan.experts), strict=True))


def lora_config(
    plans: Mapping[str, ModulePlan], model: nn.Module, config: LoftQConfig, base: str | None = None
) -> LoraConfig:
    """PEFT's config of the adapter. ``init_lora_weights`` stays true, so that loading never fits anything anew.

    Raises:
        ConfigError: with dropout, which PEFT does not have on experts.
    """
    from peft import LoraConfig

    has_experts = any(plan.experts for plan in plans.values())
    if has_experts and config.lora_dropout:
        raise ConfigError(
            f"lora_dropout is {config.lora_dropout}, expected 0 with an adapter on experts, where PEFT has no dropout; set it "
            f"to 0 or leave the experts out with exclude_modules"
        )
    ranks = {name: plan.rank for name, plan in plans.items() if plan.rank != config.rank}
    alpha = config.rank if config.lora_alpha is None else config.lora_alpha
    return LoraConfig(
        r=config.rank,
        lora_alpha=alpha,
        use_rslora=config.use_rslora,
        lora_dropout=config.lora_dropout,
        target_modules=minimal_target_names({n for n, p in plans.items() if not p.experts}, model),
        target_parameters=minimal_target_parameters(plans.values(), model) if has_experts else None,
        rank_pattern=ranks,
        alpha_pattern=dict(ranks) if config.lora_alpha is None else {},
        task_type=task_type(type(model).__name__),
        auto_mapping=auto_mapping(model),
        base_model_name_or_path=base,
        inference_mode=True,
    )


def auto_mapping(model: nn.Module, backbone_sha256: str | None = None) -> dict[str, str | None]:
    """A field of PEFT's config that it carries along: the base model's class, and with it the hash of the backbone.

    A config that has it names the modules of the model as it is, see :func:`names_current_modules`.

    Args:
        model: the base model. backbone_sha256: ``None`` for one that is not packed, or is not stored.
    """
    return {
        "base_model_class": type(model).__name__,
        "parent_library": type(model).__module__,
        BACKBONE_KEY: backbone_sha256,
    }


def names_current_modules(config: PeftConfig) -> bool:
    """Whether a config says that its names are those of the model as it is, by having :func:`auto_mapping`'s key."""
    return BACKBONE_KEY in (config.auto_mapping or {})


def know_experts(model: nn.Module) -> None:
    """To be called before an adapter is put on a dense model: PEFT must know how to read it if there are experts.

    See :func:`loftq.hub.experts.register_with_peft`.
    """
    if fused_experts(model):
        from loftq.hub.experts import register_with_peft

        register_with_peft()


def task_type(class_name: str) -> str | None:
    """PEFT's task type for a transformers class, or ``None``.

    Not the types with a trained head (``SEQ_CLS`` and the like): PEFT would look for that head in the adapter's file, and
    the fitted adapter is one initialisation for many tasks.
    """
    found = next((task for ending, task in _TASK_TYPES.items() if class_name.endswith(ending)), None)
    return found or ("FEATURE_EXTRACTION" if class_name.endswith("Model") else None)


def save_adapter_config(config: LoraConfig, directory: Path, model: nn.Module, backbone_sha256: str) -> None:
    """Write ``adapter_config.json`` as :func:`amend_adapter_config` leaves it."""
    config.save_pretrained(str(directory))
    amend_adapter_config(directory, model, backbone_sha256)


def amend_adapter_config(directory: Path, model: nn.Module, backbone_sha256: str | None, **changes: Any) -> None:
    """Put the backbone's hash into :func:`auto_mapping`, and fields into an order, without what is there twice.

    Args:
        model: the base model. backbone_sha256: ``None`` for one that is not packed. changes: of further fields.
    """
    path = directory / ADAPTER_CONFIG
    values: dict[str, Any] = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    values["auto_mapping"] = auto_mapping(model, backbone_sha256)
    for name in ("target_modules", "target_parameters"):  # PEFT keeps them in sets, whose order changes from run to run
        if isinstance(values.get(name), list):
            values[name] = sorted(values[name])
    if values.get("modules_to_save"):  # PEFT adds all heads it knows of to those that are named
        values["modules_to_save"] = list(dict.fromkeys(values["modules_to_save"]))
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
