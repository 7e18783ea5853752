"""The LoRA adapter as PEFT stores it: names of its tensors, its config, and the backbone it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from loftq.codec.qtensor import TensorInfo
from loftq.config import LoftQConfig
from loftq.plan.targets import ModulePlan, minimal_target_names

if TYPE_CHECKING:
    from peft import LoraConfig

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
    base = f"base_model.model.{plan.name}"
    if plan.kind == "embedding":
        return f"{base}.lora_embedding_A", f"{base}.lora_embedding_B"
    return f"{base}.lora_A.weight", f"{base}.lora_B.weight"


def tensor_layout(plan: ModulePlan) -> dict[str, TensorInfo]:
    """Dtypes and shapes of A and B: (r, in) and (out, r); for an embedding (r, num_embeddings), (embedding_dim, r)."""
    import torch

    rows, columns = plan.shape
    name_A, name_B = tensor_names(plan)
    if plan.kind == "embedding":
        rows, columns = columns, rows
    return {
        name_A: TensorInfo(torch.float32, (plan.rank, columns)),
        name_B: TensorInfo(torch.float32, (rows, plan.rank)),
    }


def adapter_tensors(plan: ModulePlan, lora_A: Tensor, lora_B: Tensor) -> dict[str, Tensor]:
    """A decomposition's factors under PEFT's names.

    PEFT adds ``(B A)ᵀ`` to an embedding's (num_embeddings, embedding_dim) table, so there the factors swap places.
    """
    name_A, name_B = tensor_names(plan)
    if plan.kind == "embedding":
        lora_A, lora_B = lora_B.T, lora_A.T
    return {name_A: lora_A.contiguous(), name_B: lora_B.contiguous()}


def lora_config(
    plans: Mapping[str, ModulePlan], model: nn.Module, config: LoftQConfig, base: str | None = None
) -> LoraConfig:
    """PEFT's config of the adapter. ``init_lora_weights`` stays true, so that loading never fits anything anew."""
    from peft import LoraConfig

    ranks = {name: plan.rank for name, plan in plans.items() if plan.rank != config.rank}
    alpha = config.rank if config.lora_alpha is None else config.lora_alpha
    return LoraConfig(
        r=config.rank,
        lora_alpha=alpha,
        use_rslora=config.use_rslora,
        lora_dropout=config.lora_dropout,
        target_modules=minimal_target_names(set(plans), model),
        rank_pattern=ranks,
        alpha_pattern=dict(ranks) if config.lora_alpha is None else {},
        task_type=task_type(type(model).__name__),
        base_model_name_or_path=base,
        inference_mode=True,
    )


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
    """Put the backbone's hash into ``auto_mapping``, a field that PEFT carries along, and fields into an order.

    Args:
        model: the base model. backbone_sha256: ``None`` for one that is not packed. changes: of further fields.
    """
    path = directory / ADAPTER_CONFIG
    values: dict[str, Any] = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    if backbone_sha256 is not None:
        values["auto_mapping"] = {
            "base_model_class": type(model).__name__,
            "parent_library": type(model).__module__,
            BACKBONE_KEY: backbone_sha256,
        }
    if isinstance(values["target_modules"], list):  # PEFT keeps them in a set, whose order changes from run to run
        values["target_modules"] = sorted(values["target_modules"])
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
