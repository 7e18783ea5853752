"""Merging: a dense checkpoint with Q + scaling * B A, for everything that loads plain safetensors."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from loftq.checkpoint.source import INDEX
from loftq.checkpoint.writer import check_target, disk_errors
from loftq.codec.scales import DTYPES
from loftq.config import one_of
from loftq.hub.adapter import INIT_DIR
from loftq.hub.backbone import check_adapter
from loftq.hub.quantizer import dequantize_modules, restore_conv1d
from loftq.refine.record import REFINEMENT
from loftq.report.record import REPORT


def export_dense(
    directory: str | Path, out_dir: str | Path, *, adapter: str | Path | None = None, dtype: str = "bfloat16"
) -> Path:
    """Merge an adapter into the dequantized backbone it belongs to and save a plain transformers checkpoint.

    The adapter is added to Q in float32 and rounded once. It is never added to the original weights: that would count
    the residual twice.

    Args:
        directory: a folder that ``loftq quantize`` has written.
        out_dir: created; must be absent or empty.
        adapter: the adapter's folder, by default the fitted one in ``loftq_init``.
        dtype: of the saved weights.

    Raises:
        BackboneMismatchError: the adapter belongs to another backbone.
        SourceError, OutputError, ConfigError: see the message.
    """
    from loftq.hub.load import load

    directory, out_dir = Path(directory), Path(os.path.expanduser(out_dir)).resolve()
    one_of("dtype", dtype, DTYPES)
    adapter_dir = directory / INIT_DIR if adapter is None else Path(adapter)
    check_target(out_dir)
    check_adapter(directory, adapter_dir)
    model = load(directory, adapter=adapter_dir, dtype=torch.float32)
    dequantize_modules(model)
    merged: Any = restore_conv1d(model.merge_and_unload()).to(DTYPES[dtype])
    if hasattr(merged.config, "quantization_config"):
        del merged.config.quantization_config
    merged.hf_quantizer = None
    merged.is_quantized = False
    with disk_errors(out_dir):
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
        try:
            merged.save_pretrained(partial)
            for file in directory.iterdir():
                if file.is_file() and not (partial / file.name).exists() and _is_extra(file):
                    shutil.copyfile(file, partial / file.name)
            partial.chmod(0o777 & ~_umask())  # mkdtemp's folders are private
            os.replace(partial, out_dir)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return out_dir


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _is_extra(file: Path) -> bool:
    return file.suffix != ".safetensors" and file.name not in (INDEX, "config.json", REPORT, REFINEMENT)
