"""The model that a run trains, for each method: the same modules, ranks and heads, and nothing but the start differs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loftq.data.tasks import task
from loftq.errors import ConfigError, LoftQError, SourceError, first_line
from loftq.evaluate.models import check_exists, is_quantized
from loftq.finetune.adapter import (
    TASK_TYPES,
    head_names,
    initialise,
    load_factors,
    module_names,
    reset_magnitudes,
    task_lora_config,
)
from loftq.finetune.settings import TrainSettings
from loftq.hub.adapter import know_experts
from loftq.hub.backbone import read_quantization_config
from loftq.hub.pretrained import load_pretrained
from loftq.report.record import QuantizationReport

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

PLAIN = ("qlora", "rtn", "gptq")
"""Methods of ``loftq quantize`` whose adapter is PEFT's default, which changes nothing at the start."""


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        base: the quantized folder, or the full-precision model's folder or hub id.
        folder: the quantized folder whose adapter settings hold, if any.
        revision: of a hub id; ``None`` for its main branch.
    """

    base: str
    folder: Path | None = None
    revision: str | None = None

    @property
    def quantized(self) -> bool:
        """Whether the folder is what is trained, rather than its source."""
        return self.folder is not None and self.base == str(self.folder)


def find_start(method: str, init_from: str | Path | None, model: str | None, revision: str | None = None) -> Start:
    """Which model a method trains.

    Args:
        init_from: a quantized folder. model: a full-precision model, for ``lora`` and ``full``; by default the source that
            the quantized folder names. revision: of ``model``, a hub id.

    Raises:
        ConfigError: a method without the model that it needs, or a revision of what has none. SourceError: there is no such
            model.
    """
    if revision is not None and model is None:
        raise ConfigError(
            f"the revision {revision} is of no model, expected a hub id with --model; leave --revision out"
        )
    folder = None
    if init_from is not None:
        read_quantization_config(Path(init_from))
        folder = Path(init_from)
    if method in ("loftq", "qlora"):
        if folder is None or model is not None:
            raise ConfigError(
                f"the method {method} trains a quantized folder, expected one with --init-from and no --model; make it with "
                f"`loftq quantize {model or 'MODEL'} --out FOLDER{' --method qlora' if method == 'qlora' else ''}`"
            )
        made_by = QuantizationReport.load(folder).config.get("method")
        if method == "qlora" and made_by not in PLAIN:
            raise ConfigError(
                f"the method qlora trains a plainly quantized folder, but {folder} was made by {made_by}; quantize again with "
                f"--method qlora, or train it with --method loftq"
            )
        return Start(str(folder), folder)
    if model is None:
        if folder is None:
            raise ConfigError(f"the method {method} trains a full-precision model, expected one with --model")
        model = QuantizationReport.load(folder).source.get("name")
        if not isinstance(model, str):
            raise ConfigError(f"{folder} does not say which model it was made from; name it with --model")
    check_exists(model, revision)
    if is_quantized(model):
        raise ConfigError(
            f"{model} is quantized, but the method {method} trains a full-precision model; name its source"
        )
    return Start(model, folder, revision)


def build(
    start: Start, settings: TrainSettings, labels: Sequence[str] | None = None
) -> tuple[PreTrainedModel | PeftModel, list[str]]:
    """The model of a run, ready to train.

    Args:
        labels: the classes of a classification, in the order of their numbers.

    Returns:
        The model, and the names of the modules that the task adds or trains from scratch.

    Raises:
        SourceError: the model does not load, or does not fit the task. ConfigError: a setting that does not fit it.
    """
    chosen = task(settings.data.task)
    # AdamW's small steps would be lost in the rounding of half-precision weights
    loading = settings.replace(dtype="float32") if settings.method == "full" else settings
    model = load_base(start, loading, labels)
    heads = head_names(model, model.missing) if not chosen.model.endswith("LM") else []
    fresh = [h for h in heads if any(n == h or n.startswith(h + ".") for n in model.missing)]
    initialise(model, fresh, settings.seed)
    if settings.gradient_checkpointing:
        try:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise ConfigError(f"gradient_checkpointing is on, but {first_line(error)}; turn it off") from None
        model.enable_input_require_grads()
    if settings.method == "full":
        model.requires_grad_(True)
        return model, heads
    return _with_adapter(start, settings, model, heads), heads


def load_base(start: Start, settings: TrainSettings, labels: Sequence[str] | None) -> PreTrainedModel:
    """The model without adapter, with the set ``missing`` of the parameters that its checkpoint does not have."""
    import transformers

    import loftq.hub.quantizer  # noqa: F401 - registers the quantizer

    chosen = task(settings.data.task)
    options: dict[str, Any] = {"dtype": load_dtype(settings.dtype)}
    if chosen.name == "classification":
        names = list(labels or ())
        options |= {"num_labels": len(names), "problem_type": "single_label_classification"}
        options |= {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    elif chosen.name == "regression":
        options |= {"num_labels": 1, "problem_type": "regression"}
    try:
        with _quiet():  # a new head is no mistake, and what else is missing is said below
            model, info = load_pretrained(
                getattr(transformers, chosen.model),
                start.base,
                revision=start.revision,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
    except (LoftQError, MemoryError):
        raise
    except Exception as error:  # transformers and safetensors have many kinds for a damaged file
        raise SourceError(
            f"{start.base} does not load as a model for {chosen.name} ({first_line(error)}); expected one that "
            f"{chosen.model} knows"
        ) from None
    mismatched = {m[0] if isinstance(m, tuple) else m for m in info["mismatched_keys"]}
    wrong = sorted(n for n in mismatched if n.startswith(model.base_model_prefix + "."))
    if wrong:
        raise SourceError(
            f"{start.base} has {wrong[0]} in another shape than its config.json says; its files do not belong together, "
            f"restore them"
        )
    missing = set(info["missing_keys"]) | mismatched
    inside = sorted(n for n in missing if n.startswith(model.base_model_prefix + "."))
    if len(inside) > len(missing) // 2 and len(inside) > 4:
        raise SourceError(
            f"{start.base} lacks {inside[0]} (and {len(inside) - 1} more tensors) of {type(model).__name__}; its files are "
            f"incomplete, or it is of another architecture"
        )
    if chosen.model.endswith("LM") and missing:
        raise SourceError(
            f"{start.base} lacks {sorted(missing)[0]}, without which {type(model).__name__} cannot write; expected a model for "
            f"{chosen.name}"
        )
    model.missing = missing
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def load_dtype(name: str) -> torch.dtype:
    """The dtype of frozen weights."""
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def _with_adapter(start: Start, settings: TrainSettings, model: PreTrainedModel, heads: list[str]) -> PeftModel:
    from peft import LoraConfig, get_peft_model

    chosen = task(settings.data.task)
    names: dict[str, str] = {}
    if start.folder is not None:
        names = module_names(QuantizationReport.load(start.folder), model)
        modules = dict(model.named_modules())
        tables = [n for n in names.values() if isinstance(modules.get(n), torch.nn.Embedding)]
        if settings.use_dora and tables:
            raise ConfigError(
                f"use_dora is on, but {start.folder} has an adapter on the embedding {tables[0]}, which has no outputs to "
                f"scale; turn it off, or quantize without embeddings"
            )
        config = task_lora_config(
            start.folder,
            names,
            model,
            chosen.model,
            heads,
            lora_dropout=settings.lora_dropout,
            use_dora=settings.use_dora,
        )
    else:
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.rank if settings.lora_alpha is None else settings.lora_alpha,
            use_rslora=settings.use_rslora,
            lora_dropout=settings.lora_dropout or 0.0,
            target_modules=settings.target_modules
            if isinstance(settings.target_modules, str)
            else list(settings.target_modules),
            task_type=TASK_TYPES[chosen.model],
            modules_to_save=list(heads) or None,
            use_dora=settings.use_dora,
        )
    know_experts(model)
    torch.manual_seed(settings.seed)
    try:
        wrapped = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError, re.error) as error:
        raise ConfigError(
            f"PEFT cannot add this adapter ({first_line(error)}); change the target modules or DoRA"
        ) from None
    for parameter in wrapped.parameters():
        if parameter.requires_grad:  # PEFT leaves float16's adapters, and the heads, in the dtype of the frozen weights
            parameter.data = parameter.data.float()
    if start.quantized and start.folder is not None:
        load_factors(wrapped, start.folder, names)
    elif settings.use_dora:
        reset_magnitudes(wrapped)
    return wrapped
