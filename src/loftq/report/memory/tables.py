"""The memory of a model as tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from loftq.report.memory.footprint import Footprint
from loftq.report.memory.training import TrainingMemory
from loftq.report.tables import console, size, table

_METHODS = {"loftq": "packed + LoRA", "lora": "dense + LoRA", "full": "all weights"}
_ROWS = ("weights", "optimizer", "activations", "transient", "workspace", "peak")


def print_footprint(footprint: Footprint) -> None:
    """Parameters, bytes and share of every part, then the ratios."""
    parts = [(name, part.parameters, part.nbytes) for name, part in footprint.parts.items()]
    total = footprint.model_parameters + footprint.adapters.parameters
    rows = [
        [name, f"{parameters:,}", size(nbytes), f"{100 * nbytes / footprint.total_bytes:.1f} %"]
        for name, parameters, nbytes in [*parts, ("total", total, footprint.total_bytes)]
    ]
    columns = dict.fromkeys(("parameters", "size", "share"), "right")
    out = console()
    out.print(table({"": "left", **columns}, rows))
    out.print(
        f"{footprint.bits_per_weight:.3f} bits per weight of the backbone; with adapters "
        f"{100 * footprint.stored_ratio:.1f} % of the pretrained model's {size(footprint.pretrained_bytes)}, "
        f"{100 * footprint.trainable_share:.2f} % of its parameters trainable"
    )
    out.print(
        f"as the LoftQ paper counts, quantized modules alone: compression ratio "
        f"{100 * footprint.compression_ratio:.1f} %, trainable ratio {100 * footprint.trainable_ratio:.1f} %"
    )


def print_training(memories: Sequence[TrainingMemory]) -> None:
    """What a training step takes, one column a method; all for the same batch."""
    setup = memories[0].setup
    with_checkpointing = ", gradient checkpointing" if setup.checkpointing else ""
    tokens = f"{setup.batch_size} × {setup.length} tokens"
    shown = [name for name in _ROWS if any(getattr(m, name) for m in memories)]
    rows = [[name, *(size(getattr(m, name)) for m in memories)] for name in shown]
    columns = {"": "left", **dict.fromkeys((_METHODS[m.setup.method] for m in memories), "right")}
    out = console()
    out.print(f"\ntraining memory on {setup.device}: {tokens}, {setup.dtype}, AdamW{with_checkpointing}")
    out.print(table(columns, rows))
