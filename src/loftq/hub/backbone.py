"""Which backbone an adapter was made for."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from loftq.checkpoint.source import SafetensorsSource, as_bytes, read_json
from loftq.errors import BackboneMismatchError, SourceError
from loftq.hub.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BACKBONE_KEY, INIT_DIR
from loftq.report.record import REPORT, QuantizationReport

_UNSAVED = "the backbone {} that loftq.quantize_model left in memory; write it with loftq.save"


def combine_digests(digests: Mapping[str, str]) -> str:
    """sha256 over the sorted (tensor name, sha256 of its bytes) pairs: the same however tensors are split into files."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def backbone_sha256(directory: Path) -> str:
    """The hash of a quantized folder's weights, read from its files.

    Raises:
        SourceError: if the weights are missing or damaged.
    """
    return _content_sha256(SafetensorsSource(Path(directory)))


def adapter_sha256(directory: Path) -> str:
    """The hash of a quantized folder's fitted adapter, read from its file.

    Raises:
        SourceError: if the adapter is missing or damaged.
    """
    return _content_sha256(SafetensorsSource(Path(directory) / INIT_DIR, single=ADAPTER_WEIGHTS))


def _content_sha256(source: SafetensorsSource) -> str:
    return combine_digests({name: _tensor_sha256(source.read(name)) for name in source.tensors})


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """The hash of tensors in memory: that of the files which hold them under these names."""
    return combine_digests({name: _tensor_sha256(tensor.cpu().contiguous()) for name, tensor in tensors.items()})


def _tensor_sha256(tensor: Tensor) -> str:
    return hashlib.sha256(memoryview(as_bytes(tensor))).hexdigest()


def unwrapped_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model as it is without what PEFT has put on it in place: adapters, and copies that are trained."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inner = {name: "base_layer" for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            inner[name] = "original_module"
    state = {}
    for key, tensor in model.state_dict().items():
        path, kept = "", []
        for part in key.split("."):
            if path not in inner:
                kept.append(part)
            elif part != inner[path]:
                break
            path = f"{path}.{part}" if path else part
        else:
            state[".".join(kept)] = tensor
    return state


def backbone_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that a folder with this packed model holds, adapters apart: of two that are tied the one that is loaded."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    left_out = getattr(model, "_keys_to_ignore_on_save", None) or ()
    state = unwrapped_state(model)
    return {
        name: tensor
        for name, tensor in state.items()
        if name not in left_out and not (tied.get(name) in state and _same_memory(tensor, state[tied[name]]))
    }


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return (one.data_ptr(), one.shape, one.dtype) == (other.data_ptr(), other.shape, other.dtype)


def unsaved_base(backbone_sha256: str) -> str:
    """What an adapter names as its base model while its backbone is in memory alone.

    It is no path and no name on the hub: whatever would load the base model says this instead of loading the dense one. And
    it carries the hash for the classes for which PEFT drops ``auto_mapping``.
    """
    return _UNSAVED.format(backbone_sha256)


def adapter_config(adapter_dir: Path) -> dict[str, Any]:
    """The config of the PEFT adapter in a folder.

    Raises:
        SourceError: there is none, or a damaged one.
    """
    path = Path(adapter_dir) / ADAPTER_CONFIG
    if not path.exists():
        raise SourceError(f"{adapter_dir} has no {ADAPTER_CONFIG}, expected a PEFT adapter folder")
    return read_json(path)


def recorded_backbone(config: Mapping[str, Any]) -> str | None:
    """The hash of the backbone an adapter's config says it was made for, if it says so."""
    found: str | None = (config.get("auto_mapping") or {}).get(BACKBONE_KEY)
    if found is None:
        named = re.fullmatch(_UNSAVED.format("([0-9a-f]{64})"), str(config.get("base_model_name_or_path")))
        return named and named[1]
    return found


def check_adapter(directory: Path, adapter_dir: Path) -> str:
    """The hash of the backbone in ``directory``, after checking that the adapter was made for it.

    Raises:
        SourceError: no adapter there.
        BackboneMismatchError: the adapter names another backbone, or none and another base model.
    """
    config = adapter_config(adapter_dir)
    actual = backbone_sha256(directory)
    _check_belongs(config, recorded_backbone(config), directory, adapter_dir, actual)
    return actual


def check_adapter_fits(directory: Path, adapter_dir: Path) -> None:
    """The same from the folder's report, whose weights are read only if it has none.

    An adapter that bears no mark of ours, and whose base model is no quantized folder, may have been trained anywhere: what
    it fits is for the user to know.

    Raises:
        SourceError, BackboneMismatchError: as :func:`check_adapter`.
    """
    config = adapter_config(adapter_dir)
    base = Path(str(config.get("base_model_name_or_path")))
    recorded = recorded_backbone(config)
    if recorded is None and (base / REPORT).is_file():
        recorded = QuantizationReport.load(base).backbone_sha256
    if recorded is None and BACKBONE_KEY not in (config.get("auto_mapping") or {}):
        return
    known = (directory / REPORT).exists()
    actual = QuantizationReport.load(directory).backbone_sha256 if known else backbone_sha256(directory)
    _check_belongs(config, recorded, directory, adapter_dir, actual)


def check_adapter_of_dense(model: str | Path, adapter_dir: Path) -> None:
    """Refuse an adapter of a packed backbone for a dense model, where what it makes up for would count twice.

    Raises:
        SourceError: no adapter there. BackboneMismatchError: it belongs to a packed backbone.
    """
    recorded = recorded_backbone(adapter_config(adapter_dir))
    if recorded is not None:
        raise BackboneMismatchError(
            f"the adapter in {adapter_dir} belongs to the packed backbone {recorded[:12]}…, but {model} is dense, where what "
            f"it makes up for would count twice; use it with the quantized folder it was trained on"
        )


def _check_belongs(
    config: Mapping[str, Any], recorded: str | None, directory: Path, adapter_dir: Path, actual: str
) -> None:
    base = config.get("base_model_name_or_path")
    if recorded is None:
        if base is not None and Path(base).resolve() == Path(directory).resolve():
            return
        raise BackboneMismatchError(
            f"the adapter in {adapter_dir} does not say which backbone it belongs to and names base model {base!r}, "
            f"expected {directory}; use it with the model that it was trained on"
        )
    if recorded != actual:
        raise BackboneMismatchError(
            f"the adapter in {adapter_dir} belongs to backbone {recorded[:12]}…, but {directory} holds {actual[:12]}…; use it "
            f"with the quantized folder it was trained on (its base is {base!r})"
        )


def read_quantization_config(directory: Path) -> dict[str, Any]:
    """The ``quantization_config`` of a quantized folder.

    Raises:
        SourceError: the folder is none.
    """
    path = Path(directory) / "config.json"
    values = read_json(path).get("quantization_config") if path.exists() else None
    if not isinstance(values, dict) or values.get("quant_method") != "loftq":
        raise SourceError(
            f"{directory} is no quantized folder of loftq, expected one that `loftq quantize` has written"
        )
    return values
