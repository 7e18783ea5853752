"""Which backbone an adapter was made for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loftq.checkpoint.source import SafetensorsSource, as_bytes, read_json
from loftq.errors import BackboneMismatchError, SourceError
from loftq.hub.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BACKBONE_KEY, INIT_DIR


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
    digests = {n: hashlib.sha256(memoryview(as_bytes(source.read(n)))).hexdigest() for n in source.tensors}
    return combine_digests(digests)


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
    return (config.get("auto_mapping") or {}).get(BACKBONE_KEY)


def check_adapter(directory: Path, adapter_dir: Path) -> str:
    """The hash of the backbone in ``directory``, after checking that the adapter was made for it.

    Raises:
        SourceError: no adapter there.
        BackboneMismatchError: the adapter names another backbone, or none and another base model.
    """
    config = adapter_config(adapter_dir)
    actual = backbone_sha256(directory)
    recorded = recorded_backbone(config)
    if recorded is None:
        base = config.get("base_model_name_or_path")
        if base is not None and Path(base).resolve() == Path(directory).resolve():
            return actual
        raise BackboneMismatchError(
            f"the adapter in {adapter_dir} does not say which backbone it belongs to and names base model {base!r}, "
            f"expected {directory}; only an adapter trained on this folder can be merged into it"
        )
    if recorded != actual:
        raise BackboneMismatchError(
            f"the adapter in {adapter_dir} belongs to backbone {recorded[:12]}…, but {directory} holds {actual[:12]}…; "
            f"merge it into the quantized folder it was trained on (its base is {config.get('base_model_name_or_path')!r})"
        )
    return actual


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
