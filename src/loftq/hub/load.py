"""Loading a quantized folder: the packed backbone through transformers, the adapter through PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq.checkpoint.naming import architecture
from loftq.errors import LoftQError, SourceError, first_line
from loftq.hub.adapter import INIT_DIR, know_experts
from loftq.hub.backbone import check_adapter_fits, read_quantization_config
from loftq.hub.pretrained import check_adapter_file, load_pretrained

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel


def load_backbone(directory: str | Path, **from_pretrained_kwargs: Any) -> PreTrainedModel:
    """The packed model without adapter, of the class its ``config.json`` names.

    Raises:
        SourceError: if the folder is no quantized one, or its tensors do not fit the model.
    """
    import transformers
    from transformers import AutoConfig

    import loftq.hub.quantizer  # noqa: F401 - registers the quantizer

    directory = Path(directory)
    read_quantization_config(directory)
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        cls = architecture(config) or transformers.AutoModel
        model, info = load_pretrained(cls, directory, output_loading_info=True, **from_pretrained_kwargs)
    except (LoftQError, MemoryError):
        raise
    except Exception as error:  # transformers and safetensors have many kinds for a damaged file
        raise SourceError(
            f"{directory} does not load ({first_line(error)}); its files are incomplete, quantize again"
        ) from None
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise SourceError(
            f"{directory} lacks {missing[0]} (and {len(missing) - 1} more tensors), expected all of {cls.__name__}'s; "
            f"quantize again"
        )
    return model


def load(
    directory: str | Path, *, adapter: str | Path | None = None, trainable: bool = False, **from_pretrained_kwargs: Any
) -> PeftModel:
    """The packed model with its adapter: ``AutoModel….from_pretrained`` followed by ``PeftModel.from_pretrained``.

    Args:
        directory: a folder that ``loftq quantize`` has written.
        adapter: another adapter's folder; by default the fitted one in ``loftq_init``.
        trainable: leave the adapter trainable.
        from_pretrained_kwargs: for transformers' ``from_pretrained``, e.g. ``dtype`` or ``device_map``.

    Raises:
        SourceError: if the folder or the adapter is missing or incomplete.
        BackboneMismatchError: if the adapter was made for another backbone, or by loftq for none that it names.
    """
    directory = Path(directory)
    model = load_backbone(directory, **from_pretrained_kwargs)
    adapter_dir = directory / INIT_DIR if adapter is None else Path(adapter)
    check_adapter_fits(directory, adapter_dir)
    return with_adapter(model, adapter_dir, trainable=trainable)


def with_adapter(model: nn.Module, adapter_dir: Path, *, trainable: bool = False) -> PeftModel:
    """``PeftModel.from_pretrained``, for a packed or a dense model.

    Raises:
        SourceError: the adapter is damaged, pickled, or another model's.
    """
    from peft import PeftModel

    check_adapter_file(adapter_dir)
    know_experts(model)
    try:
        return PeftModel.from_pretrained(model, str(adapter_dir), is_trainable=trainable)
    except Exception as error:  # PEFT, torch and safetensors have many kinds for it
        raise SourceError(
            f"the adapter in {adapter_dir} does not load ({first_line(error)}); expected a PEFT adapter of this model, fetch "
            f"or train it again"
        ) from None
