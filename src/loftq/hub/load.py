"""Loading a quantized folder: the packed backbone through transformers, the adapter through PEFT."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq.checkpoint.naming import architecture
from loftq.errors import LoftQError, SourceError, first_line
from loftq.hub.adapter import INIT_DIR, know_experts
from loftq.hub.backbone import adapter_config, check_adapter_fits, read_quantization_config
from loftq.hub.pretrained import check_adapter_file, load_pretrained

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

_ADAPTER_NAME = "default"  # PEFT's, in the names of an adapter's tensors in a model


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
        SourceError: if the folder or the adapter is missing or incomplete, or the adapter's tensors are not the model's,
            as those of a run for a task with a head of its own.
        BackboneMismatchError: if the adapter was made for another backbone, or by loftq for none that it names.
    """
    directory = Path(directory)
    model = load_backbone(directory, **from_pretrained_kwargs)
    adapter_dir = directory / INIT_DIR if adapter is None else Path(adapter)
    check_adapter_fits(directory, adapter_dir)
    return with_adapter(model, adapter_dir, trainable=trainable)


def with_adapter(model: nn.Module, adapter_dir: Path, *, trainable: bool = False) -> PeftModel:
    """``PeftModel.from_pretrained``, for a packed or a dense model, and all of the adapter or nothing.

    Raises:
        SourceError: the adapter is damaged, pickled, or another model's.
    """
    from peft import PeftModel

    check_adapter_file(adapter_dir)
    know_experts(model)
    lacking: list[str] = []
    unplaced: list[str] = []

    def note(module: nn.Module, keys: Any) -> None:
        lacking.extend(name for name in keys.missing_keys if _ADAPTER_NAME in name.split("."))
        unplaced.extend(keys.unexpected_keys)

    # PEFT only warns of what an adapter lacks, and says nothing of what there is no place for
    hook = model.register_load_state_dict_post_hook(note)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")
            loaded = PeftModel.from_pretrained(model, str(adapter_dir), _ADAPTER_NAME, is_trainable=trainable)
    except Exception as error:  # PEFT, torch and safetensors have many kinds for it
        raise SourceError(
            f"the adapter in {adapter_dir} does not load ({first_line(error)}); expected a PEFT adapter of this model, fetch "
            f"or train it again"
        ) from None
    finally:
        hook.remove()
    if lacking or unplaced:
        raise _misfit(model, adapter_dir, lacking, unplaced)
    return loaded


def _misfit(model: nn.Module, adapter_dir: Path, lacking: list[str], unplaced: list[str]) -> SourceError:
    """What to say of an adapter whose tensors are not the model's; the lists hold PEFT's names of them in a model."""
    kind, told = type(model).__name__, []
    for words, names in (("it lacks", lacking), ("there is no place for its", unplaced)):
        if names:
            first = min(names).replace(f".modules_to_save.{_ADAPTER_NAME}", "").replace(f".{_ADAPTER_NAME}", "")
            told.append(f"{words} {first}" + (f" (and {len(names) - 1} more tensors)" if len(names) > 1 else ""))
    made_for = (adapter_config(adapter_dir).get("auto_mapping") or {}).get("base_model_class") or kind
    origin, advice = "", "fetch or train it again"
    if made_for != kind:
        origin = f"was trained on a {made_for} and "
        advice = (
            f"a run of `loftq train` is given to load_run, `loftq evaluate` and `loftq export {adapter_dir}` itself"
        )
    return SourceError(f"the adapter in {adapter_dir} {origin}does not fit {kind}: {' and '.join(told)}; {advice}")
