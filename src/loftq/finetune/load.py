"""Loading what a training run has left."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loftq.checkpoint.naming import architecture
from loftq.data.tasks import task
from loftq.errors import BackboneMismatchError, ConfigError, LoftQError, SourceError
from loftq.evaluate.models import check_causal, check_exists, is_quantized, load_for_inference
from loftq.finetune.adapter import TASK_TYPES
from loftq.finetune.model import Start, load_base
from loftq.finetune.places import candidates
from loftq.finetune.record import RECORD, TrainingRecord
from loftq.finetune.settings import TrainSettings
from loftq.hub.load import with_adapter
from loftq.report.record import QuantizationReport

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel


def is_run(folder: str | Path) -> bool:
    """Whether ``loftq train`` has written the folder."""
    return (Path(folder) / RECORD).is_file()


def load_run(
    folder: str | Path, *, dtype: str | None = None, init_from: str | Path | None = None
) -> tuple[nn.Module, TrainingRecord]:
    """The model of a run in eval mode: its backbone with the trained adapter and heads, or all of its weights.

    ``dtype=None`` is the run's own. ``init_from``: the folder that the run was trained on, if it was moved; by default the
    first of its recorded places that holds it.

    Raises:
        SourceError: the run or its backbone is missing or damaged. BackboneMismatchError: the backbone was quantized again
            since. ConfigError: ``init_from`` for a run that holds all of its weights.
    """
    folder = Path(folder)
    record = TrainingRecord.load(folder)
    model = assemble(folder, record, dtype=dtype, init_from=init_from)
    return _placed(model, folder, record.train_settings.data.task), record


def assemble(
    folder: Path, record: TrainingRecord, *, dtype: str | None = None, init_from: str | Path | None = None
) -> PreTrainedModel | PeftModel:
    """The model of a run on the CPU, as transformers and PEFT load it.

    Args:
        dtype, init_from: as for :func:`load_run`.

    Raises:
        SourceError, BackboneMismatchError, ConfigError: as :func:`load_run`.
    """
    settings = record.train_settings
    if dtype is not None:
        settings = settings.replace(dtype=dtype)
    if settings.method == "full":
        if init_from is not None:
            raise ConfigError(f"{folder} holds all of its weights, expected no --init-from; leave it out")
        settings = settings.replace(dtype=dtype or "float32")  # as trained and measured
        return load_base(Start(str(folder)), settings, record.labels)
    start = Start(find_base(folder, record, init_from), revision=record.revision)
    return with_adapter(load_base(start, settings, record.labels), folder)


def load_causal(
    model: str,
    *,
    revision: str | None = None,
    adapter: Path | None = None,
    use_adapter: bool = True,
    dtype: str | None = None,
    init_from: str | Path | None = None,
) -> nn.Module:
    """A causal language model in eval mode: a run of ``loftq train``, or what ``load_for_inference`` takes.

    ``dtype=None`` is the run's own, or ``auto``. ``revision`` is of a hub id, ``init_from`` of a run, see
    :func:`load_run`.

    Raises:
        SourceError, BackboneMismatchError: as there. ConfigError: another adapter for a run, or a revision of a folder.
    """
    refuse_start_of_no_run(model, init_from)
    if not is_run(model):
        return load_for_inference(
            model, adapter=adapter, use_adapter=use_adapter, dtype=dtype or "auto", revision=revision
        )
    check_exists(model, revision)
    if adapter is not None or not use_adapter:
        raise ConfigError(f"{model} is a run of `loftq train` with its own adapter; name its quantized folder instead")
    loaded, record = load_run(model, dtype=dtype, init_from=init_from)
    if not task(record.train_settings.data.task).is_causal:
        check_causal(loaded, model)
    return loaded


def refuse_start_of_no_run(model: str, init_from: str | Path | None) -> None:
    """A :class:`ConfigError` for the folder that a run was trained on where the model is no run."""
    if init_from is not None and not is_run(model):
        raise ConfigError(f"--init-from is for a run of `loftq train`, but {model} is none; leave it out")


def find_base(run: Path, record: TrainingRecord, init_from: str | Path | None = None) -> str:
    """The folder that a run was trained on, or the hub id: the first of :func:`loftq.finetune.places.candidates` that is here
    and, for a quantized folder, holds the backbone with the recorded hash. ``init_from`` takes their place.

    Raises:
        SourceError: there is none. BackboneMismatchError: the first one holds another backbone, or one at all where the run
            was trained on full precision.
    """
    where = candidates(run, record.base, record.places) if init_from is None else [str(init_from)]
    if record.backbone_sha256 is None:
        if init_from is not None and not os.path.isdir(init_from):
            raise SourceError(f"--init-from is {init_from}, which does not exist here; expected a model's folder")
        if init_from is not None and is_quantized(init_from):
            raise BackboneMismatchError(
                f"{run} was trained on the full-precision {record.base}, but {init_from} is quantized; name that model's "
                f"folder with --init-from, or leave it out"
            )
        return next((place for place in where if os.path.isdir(place)), record.base)  # of no folder, a hub id
    problems: list[LoftQError] = []
    for place in where:
        if os.path.isdir(place):
            problem = _misfit(run, record.backbone_sha256, place)
            if problem is None:
                return place
            problems.append(problem)
    if problems:
        raise problems[0]
    raise SourceError(
        f"{run} was trained on {where[0]}, which does not exist here; put that quantized folder back in its place, or name it "
        f"with --init-from"
    )


def _misfit(run: Path, backbone: str, place: str) -> LoftQError | None:
    """Why a folder is not the one whose backbone has this hash."""
    try:
        if not is_quantized(place):
            return SourceError(f"{run} was trained on {place}, which is no quantized folder any more; quantize again")
        actual = QuantizationReport.load(Path(place)).backbone_sha256
    except SourceError as error:
        return error
    if actual == backbone:
        return None
    return BackboneMismatchError(
        f"{run} was trained on backbone {backbone[:12]}…, but {place} holds {actual[:12]}…; an adapter only fits the backbone "
        f"it was trained on, name its folder with --init-from"
    )


def _placed(model: Any, source: str | Path, name: str) -> nn.Module:
    """The model where it is used, after a look whether it is one for the task of that name."""
    placed: nn.Module = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    if task(name).is_causal:
        check_causal(placed, source)
    return placed


def load_for_task(
    model: str, name: str, labels: list[str] | None, dtype: str, revision: str | None = None
) -> nn.Module:
    """A model that is no run of ours, for measuring a task: a quantized folder with its fitted adapter, or any model whose
    checkpoint has the task's head. ``revision`` is of a hub id.

    Raises:
        SourceError: it does not load, or has no such head.
    """
    from loftq.data.prepare import DataSettings
    from loftq.hub.load import load

    if is_quantized(model):
        loaded = load(model, dtype=torch.float32 if dtype == "auto" and not torch.cuda.is_available() else dtype)
        found = architecture(loaded.config)
        if task(name).model not in _auto_classes(found):
            raise SourceError(
                f"{model} is a {found.__name__ if found else 'base model'} without a trained head for {name}; train one with "
                f"`loftq train RUN --init-from {model} --task {name} …` and measure RUN"
            )
        return _placed(loaded, model, name)
    settings = TrainSettings(DataSettings(name, "-"), method="full", dtype=dtype)
    loaded_base = load_base(Start(model, revision=revision), settings, labels)
    if loaded_base.missing:
        raise SourceError(
            f"{model} has no {sorted(loaded_base.missing)[0]}, the trained head for {name}; train one with `loftq train`"
        )
    return _placed(loaded_base, model, name)


def _auto_classes(cls: Any) -> set[str]:
    """Names of the AutoModel classes that would build this class."""
    import transformers

    return {n for n in TASK_TYPES if cls is not None and cls in getattr(transformers, n)._model_mapping.values()}
