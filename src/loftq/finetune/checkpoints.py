"""The checkpoints of an interrupted run: which one to continue from."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from loftq.checkpoint.writer import disk_errors, replace_text
from loftq.errors import first_line

_STATE = "trainer_state.json"
_NEEDED = ((_STATE,), ("optimizer.pt", "optimizer.bin"), ("scheduler.pt",))  # .bin: of FSDP


def resume_point(
    folder: Path, notice: Callable[[str], None] = lambda sentence: None, *, until: int | None = None
) -> Path | None:
    """The latest whole checkpoint, of the step ``until`` at the latest where one is given; ``None`` to begin anew.

    Damaged ones are removed, and ``notice`` is told.

    A checkpoint without the Trainer's state, which is written last, is one that was never finished, and nothing to tell.

    Raises:
        OutputError: the folder cannot be written to.
    """
    with disk_errors(folder):
        found = [p for p in folder.glob("checkpoint-*") if (p / _STATE).is_file()]
        found = [p for p in found if until is None or step_of(p) <= until]
        for checkpoint in sorted(found, key=step_of, reverse=True):
            problem = damage(checkpoint)
            if problem is None:
                _relocate(checkpoint)
                return checkpoint
            earlier = [p for p in found if step_of(p) < step_of(checkpoint)]
            then = "an earlier checkpoint is tried" if earlier else "the run begins anew"
            notice(f"{checkpoint} is damaged ({problem}); it is removed and {then}")
            shutil.rmtree(checkpoint)
    return None


def step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def damage(checkpoint: Path) -> str | None:
    """What keeps a run from being continued from a checkpoint, in a few words.

    The Trainer's files are checked by their own sums; of weights, which have none, the sizes.
    """
    for names in _NEEDED:
        if not any((checkpoint / name).is_file() for name in names):
            return f"{names[0]} is missing"
    try:
        state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        if state["global_step"] != step_of(checkpoint):
            return f"{_STATE} is of step {state['global_step']}"
        best = _best(checkpoint, state)
    except (ValueError, KeyError, TypeError) as error:
        return f"{_STATE}: {first_line(error)}"
    weights = list(checkpoint.glob("*.safetensors"))
    if not weights:
        return "it has no weights"
    for path in weights:
        try:
            with safe_open(str(path), "pt") as file:
                file.keys()
        except (OSError, SafetensorError) as error:
            return f"{path.name}: {first_line(error)}"
    for path in sorted([*checkpoint.glob("*.pt*"), *checkpoint.glob("*.bin")]):
        try:
            with zipfile.ZipFile(path) as file:
                broken = file.testzip()
        except (OSError, zipfile.BadZipFile) as error:
            return f"{path.name}: {first_line(error)}"
        if broken is not None:
            return f"{path.name}: {broken} has another checksum"
    if best is not None and best != checkpoint:
        if not best.is_dir():
            return f"{best.name}, the best so far, is missing"
        problem = damage(best)
        if problem is not None:
            return f"{best.name}, the best so far, has {problem}"
    return None


def _best(checkpoint: Path, state: dict[str, Any]) -> Path | None:
    """The best checkpoint until then; it stands beside this one, wherever the folder was when its path was written."""
    known = state.get("best_model_checkpoint")
    return None if known is None else checkpoint.parent / Path(known).name


def _relocate(checkpoint: Path) -> None:
    """Let the Trainer find the best checkpoint in a folder that has moved, or is named from another place."""
    path = checkpoint / _STATE
    state = json.loads(path.read_text(encoding="utf-8"))
    best = _best(checkpoint, state)
    if best is not None and str(best) != state["best_model_checkpoint"]:
        replace_text(path, json.dumps({**state, "best_model_checkpoint": str(best)}, indent=2) + "\n")
