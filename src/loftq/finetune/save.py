"""The result of a run as the ecosystem knows it: a PEFT adapter beside its backbone, or a whole model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from loftq.checkpoint.writer import disk_errors
from loftq.finetune.model import Start
from loftq.finetune.places import absolute
from loftq.finetune.record import TrainingRecord
from loftq.hub.adapter import ADAPTER_CONFIG, amend_adapter_config


def save_result(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    start: Start,
    record: TrainingRecord,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter with the hash of its backbone, or the model, and the tokenizer.

    ``weights``: those of the model, where several processes hold a part each.
    """
    # PEFT's "auto" would look for the base model on the hub
    options: dict[str, Any] = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    if weights is not None:
        options["state_dict"] = dict(weights)
    with disk_errors(folder):
        model.save_pretrained(str(folder), **options)  # type: ignore[operator]
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    if (folder / ADAPTER_CONFIG).exists():
        base: Any = model.get_base_model()  # type: ignore[operator]
        amend_adapter_config(folder, base, record.backbone_sha256, base_model_name_or_path=absolute(start.base))
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's card is a form that nobody has filled in
