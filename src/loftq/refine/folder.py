"""Writing a refined folder: built whole beside its place, then moved there.

``TARGET.refining/new`` is completed first. For a refinement in place the old folder then moves to ``TARGET.refining/old``
and the new one takes its name. A run killed between the two leaves no folder rather than a mixed one, and the next run
finishes the move. Weight files that stay the same are hard links, or copies where the disk has none.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from loftq.checkpoint.source import SafetensorsSource, as_bytes, read_header, read_json
from loftq.checkpoint.writer import check_target, disk_errors, replace_text
from loftq.hub.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BACKBONE_KEY, INIT_DIR
from loftq.hub.backbone import adapter_sha256, backbone_sha256
from loftq.refine.record import RefinementReport
from loftq.refine.state import STATE, work_folder
from loftq.report.record import QuantizationReport

UNREFINED = "loftq_init_unrefined"


def finish_move(target: Path) -> bool:
    """Complete what a run that was killed while moving its result left; whether there was such a thing."""
    work = work_folder(target)
    old, new = work / "old", work / "new"
    if not old.exists():
        return False
    if not target.exists():
        os.replace(new if new.exists() else old, target)
    (work / STATE).unlink(missing_ok=True)  # before "old", whose presence says that the run is finished
    shutil.rmtree(work, ignore_errors=True)
    return True


def write_refined(
    folder: Path,
    target: Path,
    adapter: Mapping[str, Tensor],
    backbone: Mapping[str, Tensor],
    errors: Mapping[str, float],
    record: RefinementReport,
) -> RefinementReport:
    """Write ``folder`` with other adapter and backbone tensors to ``target``, which may be ``folder`` itself.

    Args:
        adapter, backbone: tensor name -> new value, of the dtype and shape that is there.
        errors: module name -> |W − Q − scaling · B A| / |W| of the result, for the report.
        record: saved with the result's hashes.

    Raises:
        OutputError: it cannot be written.
    """
    new = work_folder(target) / "new"
    in_place = target == folder
    with disk_errors(target):
        if not in_place:
            check_target(target)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        _copy(folder, new, replaced={f"{INIT_DIR}/{ADAPTER_WEIGHTS}", *_files_of(folder, backbone)})
        if in_place and not backbone and adapter and not (new / UNREFINED).exists():
            # the first one ever: of a folder refined twice, it is still the quantization's own adapter
            _copy(folder / INIT_DIR, new / UNREFINED, replaced=set())
        _rewrite(folder / INIT_DIR / ADAPTER_WEIGHTS, new / INIT_DIR / ADAPTER_WEIGHTS, adapter)
        for file, names in _files_of(folder, backbone).items():
            _rewrite(folder / file, new / file, {name: backbone[name] for name in names})
        report = QuantizationReport.load(folder)
        report = dataclasses.replace(
            report,
            modules=[dataclasses.replace(m, error=errors.get(m.name, m.error)) for m in report.modules],
            adapter_sha256=adapter_sha256(new),
            backbone_sha256=backbone_sha256(new) if backbone else report.backbone_sha256,
        )
        replace_text(new / INIT_DIR / ADAPTER_CONFIG, _config_text(folder, target, report.backbone_sha256))
        for path in new.glob("*.json"):
            if path.stat().st_nlink > 1:  # what is written anew must not change the old folder
                replace_text(path, path.read_text(encoding="utf-8"))
        report.save(new)
        record = dataclasses.replace(
            record, backbone_sha256=report.backbone_sha256, adapter_sha256=report.adapter_sha256
        )
        record.save(new)
        _to_disk(new)
        if in_place:
            os.replace(folder, work_folder(target) / "old")
        elif target.exists():
            target.rmdir()
        os.replace(new, target)
    return record


def _copy(folder: Path, new: Path, replaced: set[str]) -> None:
    """Link every file but those in ``replaced`` (relative names)."""
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_dir() or name in replaced:
            continue
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file.resolve(), new / name)
        except OSError:  # another file system, or one without links
            shutil.copyfile(file, new / name)


def _files_of(folder: Path, names: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Weight file -> the tensors of ``names`` in it."""
    found: dict[str, list[str]] = {}
    for file in SafetensorsSource(folder).files if names else []:
        inside = [name for name, *_ in read_header(file) if name in names]
        if inside:
            found[file.name] = inside
    return found


def _rewrite(old: Path, new: Path, tensors: Mapping[str, Tensor]) -> None:
    """Copy a safetensors file and put other values in the places of these tensors."""
    new.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(old, new)
    with open(new, "r+b") as stream:
        for name, info, begin, _ in read_header(old):
            if name not in tensors:
                continue
            tensor = tensors[name].detach().cpu().contiguous()
            if (tensor.dtype, tuple(tensor.shape)) != info:
                raise AssertionError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, stored {info}")
            stream.seek(begin)
            stream.write(memoryview(as_bytes(tensor)))


def _config_text(folder: Path, target: Path, backbone: str) -> str:
    values = read_json(folder / INIT_DIR / ADAPTER_CONFIG)
    if values.get("auto_mapping"):
        values["auto_mapping"][BACKBONE_KEY] = backbone
    if target != folder:
        values["base_model_name_or_path"] = str(target)
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _to_disk(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
