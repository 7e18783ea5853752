"""Merging: a dense checkpoint with Q + scaling * B A, for everything that loads plain safetensors."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loftq.checkpoint.source import INDEX
from loftq.checkpoint.writer import check_target, disk_errors
from loftq.codec.scales import DTYPES
from loftq.config import one_of
from loftq.data.collate import padding_id, writing_ids
from loftq.data.prepare import tokenizer_for
from loftq.errors import ConfigError, SourceError
from loftq.evaluate.models import is_quantized
from loftq.finetune.load import assemble, find_base, is_run
from loftq.finetune.record import TrainingRecord
from loftq.hub.adapter import INIT_DIR
from loftq.hub.backbone import check_adapter
from loftq.hub.load import load
from loftq.hub.quantizer import dequantize_modules, restore_conv1d
from loftq.refine.record import REFINEMENT
from loftq.report.record import REPORT


def export_dense(
    directory: str | Path, out_dir: str | Path, *, adapter: str | Path | None = None, dtype: str = "bfloat16"
) -> Path:
    """Merge an adapter into the dequantized backbone it belongs to and save a plain transformers checkpoint.

    The adapter is added to Q in float32 and rounded once. It is never added to the original weights: that would count
    the residual twice. The adapter of a run on a full-precision model is added to that model.

    Args:
        directory: a run of ``loftq train``, saved as a model of its task's class with its heads and labels; or a folder
            that ``loftq quantize`` has written.
        out_dir: created; must be absent or empty.
        adapter: the folder of the adapter to merge into a quantized folder, or the run; by default the fitted one in
            ``loftq_init``.
        dtype: of the saved weights.

    Raises:
        BackboneMismatchError: the adapter belongs to another backbone.
        SourceError: a folder that is missing or damaged; an adapter that does not fit the class of the quantized folder.
        OutputError: ``out_dir`` holds something, or cannot be written.
        ConfigError: a run without an adapter of its own, or one of a full-precision model with a quantized folder.
    """
    directory, out_dir = Path(directory), Path(os.path.expanduser(out_dir)).resolve()
    one_of("dtype", dtype, DTYPES)
    check_target(out_dir)
    if is_run(directory) and adapter is not None:
        raise ConfigError(
            f"{directory} is a run of `loftq train` with its own adapter; name its quantized folder instead, or leave "
            f"--adapter out"
        )
    run = next((Path(folder) for folder in (directory, adapter) if folder is not None and is_run(folder)), None)
    if run is None:
        model, tokenizer = _folder_model(directory, adapter), None
    else:
        model, tokenizer = _run_model(run, None if run == directory else directory)
    merged = _merge(model).to(DTYPES[dtype])
    with disk_errors(out_dir):
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
        try:
            merged.save_pretrained(partial)
            if run is None:
                _copy_extras(directory, partial)
            elif tokenizer is not None:
                tokenizer.save_pretrained(partial)
            partial.chmod(0o777 & ~_umask())  # mkdtemp's folders are private
            os.replace(partial, out_dir)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return out_dir


def _folder_model(directory: Path, adapter: str | Path | None) -> Any:
    """A quantized folder with an adapter, in float32."""
    if not is_quantized(directory):
        raise SourceError(
            f"{directory} is neither a run of `loftq train` nor a quantized folder, expected one that `loftq train` or `loftq "
            f"quantize` has written"
        )
    adapter_dir = directory / INIT_DIR if adapter is None else Path(adapter)
    check_adapter(directory, adapter_dir)
    return load(directory, adapter=adapter_dir, dtype=torch.float32)


def _run_model(run: Path, folder: Path | None) -> tuple[Any, Any]:
    """A run's model in float32, and its tokenizer, if it has one.

    ``folder``: the quantized folder that it was trained on, if it was moved.
    """
    record = TrainingRecord.load(run)
    settings = record.train_settings
    if settings.method == "full":
        raise ConfigError(
            f"{run} is a whole model already, trained with --method full, which transformers loads as it is; there is nothing "
            f"to merge"
        )
    if record.backbone_sha256 is None and folder is not None:
        raise ConfigError(
            f"{run} was trained on the full-precision {record.base}, not on a quantized folder; use `loftq export {run}`"
        )
    base = find_base(run, record, folder)
    if record.backbone_sha256 is not None:
        check_adapter(Path(base), run)  # reads the weights, where a report alone may be out of date
    model = assemble(run, record, dtype="float32", init_from=folder)
    tokenizer = tokenizer_for(str(run), settings.data, settings.eval_data)
    padding_id(model, tokenizer)  # what training sets in the config, in its order
    if settings.data.task == "summarization":
        writing_ids(model, tokenizer)
    return model, tokenizer


def _merge(model: Any) -> Any:
    """The dense model that a packed or dense one with an adapter amounts to; in place.

    Raises:
        SourceError: an adapted weight is another module's too, which must not change.
    """
    dequantize_modules(model)
    _check_unshared(model.get_base_model())
    merged: Any = restore_conv1d(model.merge_and_unload())
    if hasattr(merged.config, "quantization_config"):
        del merged.config.quantization_config
    merged.hf_quantizer = None
    merged.is_quantized = False
    return merged


def _check_unshared(model: nn.Module) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for names in owners.values():
        adapted = next((n for n in names if n.endswith(".base_layer.weight")), None)
        if adapted is not None and len(names) > 1:
            other = next(n for n in names if n != adapted)
            raise SourceError(
                f"the adapter changes {adapted.removesuffix('.base_layer.weight')}, which shares its weight with "
                f"{other.removesuffix('.weight')} and cannot be merged alone; use the adapter as it is"
            )


def _copy_extras(directory: Path, out_dir: Path) -> None:
    """What stands beside a quantized folder's weights: the tokenizer, and whatever else its user has put there."""
    for file in directory.iterdir():
        if file.is_file() and not (out_dir / file.name).exists() and _is_extra(file):
            shutil.copyfile(file, out_dir / file.name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _is_extra(file: Path) -> bool:
    return file.suffix != ".safetensors" and file.name not in (INDEX, "config.json", REPORT, REFINEMENT)
