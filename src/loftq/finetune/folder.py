"""What stands in a run's folder while it is under way, and whether the folder may be used."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from loftq.checkpoint.writer import disk_errors, lock_file
from loftq.errors import OutputError, first_line
from loftq.finetune.places import candidates, is_same
from loftq.finetune.record import RECORD, TrainingRecord

CHECKPOINTS = "checkpoints"
PREDICTIONS = "predictions.jsonl"
BEFORE = "before.json"
LOGS = "logs"
_STARTED = "started.json"


@contextmanager
def writing(run: Path) -> Iterator[None]:
    """What keeps a file of a run from being written, as one sentence."""
    with disk_errors(run):
        try:
            yield
        except SafetensorError as error:  # its own, for a full disk too
            raise OutputError(
                f"a file of {run} could not be written or read ({first_line(error)}); free some space and run the same "
                f"command again, or start over with --no-resume"
            ) from None


@contextmanager
def locked(run: Path) -> Iterator[bool]:
    """Keep others from the run's folder; whether it is new."""
    with disk_errors(run):
        is_new = not run.exists()
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / ".lock").open("ab")
    with lock:
        lock_file(lock, run)
        yield is_new


def finished_run(run: Path, wanted: dict[str, Any], resume: bool) -> TrainingRecord | None:
    """The record of a run that is finished already, or ``None`` for one to start or continue.

    ``wanted``: what :func:`begin_run` would write. Folders and files are compared by what they are, not by their spelling: a
    quantized folder by the hash of its backbone, others by their place, also as seen from the run's folder.

    Raises:
        OutputError: the folder holds something else.
    """
    started = run / _STARTED
    if started.exists():
        if resume:
            known, wanted = _spelled_alike(run, _read_started(started), wanted)
            if known == wanted:
                return _known_result(run)
            raise OutputError(
                f"{run} holds a run with other settings ({_difference(known, wanted)}); choose another folder, or start over "
                f"with --no-resume"
            )
    elif any(p.name != ".lock" for p in run.iterdir()):
        raise OutputError(f"{run} holds something else, expected a folder that is absent, empty or a run to continue")
    return None


def begin_run(run: Path, started: dict[str, Any], resume: bool) -> None:
    """Make the folder this run's, without what an earlier one has left where it is not continued.

    ``started``: the settings, and what they were given for.
    """
    with disk_errors(run):
        if not resume:
            shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)
            for name in (RECORD, PREDICTIONS, BEFORE):
                (run / name).unlink(missing_ok=True)
        (run / _STARTED).write_text(json.dumps(started, indent=1), encoding="utf-8")


def forget_run_without_result(run: Path) -> None:
    """Leave nothing of a run that has ended before its first checkpoint and has no record either."""
    if (run / RECORD).exists() or any((run / CHECKPOINTS).glob("checkpoint-*")):
        return
    for folder in (CHECKPOINTS, LOGS):
        shutil.rmtree(run / folder, ignore_errors=True)
    for name in (_STARTED, BEFORE):
        (run / name).unlink(missing_ok=True)


def known_before(path: Path) -> dict[str, float] | None:
    """What was measured before the first step of a run that is continued, if its file is whole."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return known if isinstance(known, dict) else None


def _read_started(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(known, dict) or not isinstance(known.get("settings"), dict):
            raise ValueError("no settings in it")
        places = known.get("places")
        if places is not None and not (isinstance(places, dict) and all(isinstance(p, dict) for p in places.values())):
            raise ValueError("its places are no paths")
    except ValueError as error:
        raise OutputError(
            f"{path} is damaged ({error}); start over with --no-resume, or choose another folder"
        ) from None
    return known


def _known_result(run: Path) -> TrainingRecord | None:
    if not (run / RECORD).exists():
        return None
    record = TrainingRecord.load(run)
    if record.status.startswith("diverged") and not record.best_step:
        raise OutputError(
            f"the run in {run} diverged before its first good checkpoint and has no result; lower the learning rate and start "
            f"over with --no-resume"
        )
    return record


_NAMES = (("base",), ("folder",), ("settings", "data", "data"), ("settings", "eval_data", "data"))
"""Keys of what names a folder or a file."""


def _spelled_alike(run: Path, known: dict[str, Any], wanted: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both without their places, the names of folders and files equal where they mean the same, and otherwise absolute."""
    known, wanted = copy.deepcopy(known), copy.deepcopy(wanted)
    places, wanted_places = known.pop("places", None), wanted.pop("places", {})
    hashes = known.get("backbone_sha256"), wanted.get("backbone_sha256")
    if None in hashes:  # of a run that was begun before the hash was recorded, or without a quantized folder
        for values in (known, wanted):
            values.pop("backbone_sha256", None)
    quantized = known.get("folder")
    for keys in _NAMES:
        ours, theirs = _parent(known, keys), _parent(wanted, keys)
        name = keys[-1]
        if ours is None or theirs is None or not all(isinstance(v.get(name), str) for v in (ours, theirs)):
            continue
        if None not in hashes and ours[name] == quantized and theirs[name] == wanted["folder"]:
            ours[name] = theirs[name]  # the same if the hashes are, which are compared as well
        elif is_same(run, ours[name], places, theirs[name]):
            ours[name] = theirs[name]
        else:
            ours[name] = candidates(run, ours[name], places or {})[0]
            theirs[name] = wanted_places.get(theirs[name], {}).get("absolute", theirs[name])
    return known, wanted


def _parent(values: Any, keys: tuple[str, ...]) -> dict[str, Any] | None:
    for key in keys[:-1]:
        values = values.get(key)
        if not isinstance(values, dict):
            return None
    return values


def _difference(known: dict[str, Any], wanted: dict[str, Any]) -> str:
    flat = [{**_flat(values), **_flat(values["settings"])} for values in (known, wanted)]
    names = [n for n in {**flat[1], **flat[0]} if flat[0].get(n) != flat[1].get(n)]
    return ", ".join(f"{n}: {flat[0].get(n)!r}, not {flat[1].get(n)!r}" for n in names[:2]) or "of another version"


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """``data.limit`` for what is in ``data``; without the settings, which come after the rest."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name == "settings":
            continue
        found |= {f"{name}.{n}": v for n, v in value.items()} if isinstance(value, dict) else {name: value}
    return found
