"""The result of a run as the ecosystem knows it: a PEFT adapter beside its backbone, or a whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from loftq.checkpoint.writer import disk_errors
from loftq.finetune.model import Start
from loftq.finetune.record import TrainingRecord
from loftq.hub.adapter import ADAPTER_CONFIG, BACKBONE_KEY


def save_result(model: nn.Module, tokenizer: Any, folder: Path, start: Start, record: TrainingRecord) -> None:
    """Write the adapter with the hash of its backbone, or the model, and the tokenizer."""
    # PEFT's "auto" would look for the base model on the hub
    options = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    with disk_errors(folder):
        model.save_pretrained(str(folder), **options)  # type: ignore[operator]
    tokenizer.save_pretrained(str(folder))
    path = folder / ADAPTER_CONFIG
    if not path.exists():
        return
    values = json.loads(path.read_text(encoding="utf-8"))
    values["base_model_name_or_path"] = start.base
    if record.backbone_sha256 is not None:
        base: Any = model.get_base_model()  # type: ignore[operator]
        values["auto_mapping"] = {
            "base_model_class": type(base).__name__,
            "parent_library": type(base).__module__,
            BACKBONE_KEY: record.backbone_sha256,
        }
    if isinstance(values.get("target_modules"), list):
        values["target_modules"] = sorted(values["target_modules"])
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's card is a form that nobody has filled in
