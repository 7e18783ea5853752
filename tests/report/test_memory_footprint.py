"""Bytes predicted from a configuration equal those of the files that a quantization writes, tensor for tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loftq
from loftq import LoftQConfig, SourceError
from loftq.checkpoint.default_model import default_model_dir
from loftq.checkpoint.source import open_config
from loftq.report.memory import Footprint, Part, measure_footprint, predict_footprint
from tiny import CLASSES, tiny_model

PLAIN = {"method": "rtn", "num_iter": 0, "calibration": None}  # what is stored does not depend on how it was found
QUICK = {"bits": 4, "rank": 3, **PLAIN}

# options of LoftQConfig that change what is stored
STORED = {
    "2 bits": {"bits": 2},
    "3 bits in blocks of 32": {"bits": 3, "block_size": 32},
    "8 bits": {"bits": 8},
    "published": loftq.PUBLISHED,
    "uniform": {"codebook": "uniform", "bits": 2},
    "levels of each row": {"codebook": "lloyd-channel"},
    "scales in 8 bits": {"double_quant": True},
    "mixed": {"bits": 2, "first_layers_bits": (1, 4), "rank_pattern": {".*_proj": 5}},
    "one module": {"target_modules": ["q_proj"]},
}


def written(folder: Path) -> int:
    """Bytes of all tensors in a folder's files."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]
    return sum(t.nbytes for file in files for t in load_file(file).values())


def quantize(model, folder: Path, **options) -> tuple[Footprint, Footprint]:
    """(predicted, measured) for a model saved as a checkpoint."""
    model.save_pretrained(folder / "source")
    settings = LoftQConfig(**{**QUICK, **options})
    report = loftq.quantize_checkpoint(folder / "source", folder / "out", settings, progress=False)
    measured = measure_footprint(folder / "out")
    assert measured.total_bytes == written(folder / "out")
    assert (measured.backbone.nbytes, measured.adapters.nbytes) == (report.weight_bytes, report.adapter_bytes)
    assert measured.embeddings.nbytes + measured.rest.nbytes == report.other_bytes
    assert measured.bits_per_weight == report.bits_per_weight
    return predict_footprint(open_config(folder / "source"), settings), measured


@pytest.mark.parametrize("name", CLASSES)
def test_prediction_is_the_measurement(name, tmp_path):
    model = tiny_model(name)
    predicted, measured = quantize(model, tmp_path)
    assert predicted == measured
    assert measured.pretrained_bytes == written(tmp_path / "source")
    assert measured.model_parameters >= sum(p.numel() for p in model.parameters())  # buffers may be stored too


@pytest.mark.parametrize("options", STORED)
def test_prediction_is_the_measurement_with(options, tmp_path):
    predicted, measured = quantize(tiny_model("llama"), tmp_path, **STORED[options])
    assert predicted == measured


@pytest.mark.parametrize("name", ["llama", "bert", "deberta-v2"])
def test_quantized_embeddings_belong_to_the_backbone(name, tmp_path):
    predicted, measured = quantize(tiny_model(name), tmp_path, quantize_embeddings=True)
    assert predicted == measured
    without, _ = quantize(tiny_model(name), tmp_path / "without")
    assert predicted.embeddings.parameters == without.embeddings.parameters - 96 * 64
    assert predicted.backbone.parameters == without.backbone.parameters + 96 * 64
    assert predicted.model_parameters == without.model_parameters


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_source_in_16_bits(dtype, tmp_path):
    predicted, measured = quantize(tiny_model("bart").to(dtype), tmp_path)
    assert predicted == measured
    assert measured.pretrained_bytes == 2 * measured.model_parameters


def test_files_in_shards(tmp_path, stories_dir):
    settings = LoftQConfig(**QUICK)
    loftq.quantize_checkpoint(stories_dir, tmp_path / "out", settings, max_shard_bytes=90_000, progress=False)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert measure_footprint(tmp_path / "out") == predict_footprint(open_config(stories_dir), settings)


@pytest.mark.slow  # a quarter of a minute: it writes 400 MB
def test_smollm2(tmp_path, smollm2_gguf):
    source = default_model_dir(tmp_path / "cache")
    settings = LoftQConfig(bits=2, rank=64, **PLAIN)
    loftq.quantize_checkpoint(source, tmp_path / "out", settings, progress=False)
    predicted = predict_footprint(open_config(source), settings)
    assert measure_footprint(tmp_path / "out") == predicted
    # the README's table: 86.6 MB without the adapter, 78.2 MB adapter, 269.0 MB in bfloat16
    assert predicted.total_bytes - predicted.adapters.nbytes == pytest.approx(86.6e6, abs=0.05e6)
    assert predicted.adapters.nbytes == pytest.approx(78.2e6, abs=0.05e6)
    assert predicted.pretrained_bytes == pytest.approx(269.0e6, abs=0.05e6)
    shutil.rmtree(tmp_path / "cache")


def test_hand_counted_llama():
    """Two layers, width 64, keys and values of width 32, feed-forward 100, vocabulary 96, head not tied; float16."""
    config = tiny_model("llama").config
    config.architectures = ["LlamaForCausalLM"]
    found = predict_footprint(config, LoftQConfig(bits=2, rank=3, calibration=None), dtype="float16")
    # a layer: q, o 64 × 64, k, v 32 × 64, gate, up 100 × 64, down 64 × 100
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 100 * 64)
    # rows of 64 codes take 16 bytes and one scale, 2; rows of 100 take 25 and two scales, 4; a codebook 4 float32
    backbone = 2 * ((2 * 64 + 2 * 32 + 2 * 100) * (16 + 2) + 64 * (25 + 4) + 7 * 16)
    adapters = 2 * 3 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 100))
    assert found == Footprint(
        backbone=Part(weights, backbone),
        adapters=Part(adapters, 4 * adapters),
        embeddings=Part(2 * 96 * 64, 2 * 2 * 96 * 64),
        rest=Part(5 * 64, 2 * 5 * 64),  # norms
        pretrained_bytes=2 * (weights + 2 * 96 * 64 + 5 * 64),
    )
    assert found.compression_ratio == (backbone + 2 * adapters) / (2 * weights)
    assert found.trainable_ratio == adapters / weights
    half = predict_footprint(config, LoftQConfig(bits=2, rank=3), dtype="float16", adapter_dtype="bfloat16")
    assert half.adapters == Part(adapters, 2 * adapters)
    assert (half.backbone, half.compression_ratio) == (found.backbone, found.compression_ratio)


def test_a_tied_head_counts_once():
    config = tiny_model("qwen2").config
    config.architectures = ["Qwen2ForCausalLM"]
    assert predict_footprint(config, LoftQConfig(rank=2)).embeddings == Part(96 * 64, 4 * 96 * 64)


def test_wrong_dtypes():
    config = tiny_model("llama").config
    for options in ({"dtype": "int8"}, {"adapter_dtype": "float61"}):
        with pytest.raises(loftq.ConfigError, match=f"{next(iter(options))} is .*expected one of float32"):
            predict_footprint(config, LoftQConfig(rank=2), **options)


@pytest.fixture
def quantized(tmp_path):
    quantize(tiny_model("llama"), tmp_path)
    return tmp_path / "out"


def edit_config(folder: Path, change) -> None:
    file = folder / "config.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def test_a_dense_folder_has_nothing_to_measure(quantized):
    with pytest.raises(SourceError, match="is no quantized folder of loftq"):
        measure_footprint(quantized.parent / "source")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["quantization_config"].update(modules={}), "lists no packed modules"),
        (lambda v: v["quantization_config"]["modules"].update({"model.absent": {}}), "packed module model.absent"),
        (lambda v: v.update(model_type="no-such-model"), "transformers cannot read"),
    ],
    ids=["no modules", "unknown module", "unknown model"],
)
def test_damaged_folders(quantized, change, message):
    edit_config(quantized, change)
    with pytest.raises(SourceError, match=message) as raised:
        measure_footprint(quantized)
    assert "\n" not in str(raised.value)


def test_missing_files(quantized):
    shutil.rmtree(quantized / "loftq_init")
    with pytest.raises(SourceError, match="has neither"):
        measure_footprint(quantized)


def test_configurations_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = tiny_model("bert")
    model.save_pretrained(tmp_path)
    sizes = {open_config(path).hidden_size for path in (tmp_path, tmp_path / "config.json", str(tmp_path))}
    assert sizes == {64}
    (tmp_path / "other.json").write_text((tmp_path / "config.json").read_text())
    assert open_config(tmp_path / "other.json").hidden_size == 64
    (tmp_path / "none").mkdir()
    (tmp_path / "text.json").write_text("{}")
    for source, message in {
        tmp_path / "none": "has no config.json",
        tmp_path / "absent" / "config.json": "does not exist, expected a config.json",
        tmp_path / "text.json": "transformers cannot read",
        tmp_path / "model.safetensors": "cannot be read as JSON",
        "someone/some-model": "could not be fetched from the hub",
    }.items():
        with pytest.raises(SourceError, match=message) as raised:
            open_config(source)
        assert "\n" not in str(raised.value)


def test_a_quantized_folder_is_no_source(quantized):
    with pytest.raises(SourceError, match="is quantized already"):
        open_config(quantized)
