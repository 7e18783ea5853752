"""Errors of a quantized folder, from its bytes, against a float64 transcription."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from loftq import LoftQConfig, load, quantize_checkpoint
from loftq.errors import SourceError
from loftq.evaluate.output_error import ErrorMeter, output_errors
from loftq.modules import PackedWeight
from loftq.modules.linear import is_transposed
from tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def moments(shapes, diagonal=False):
    """Random second moments of correlated inputs, by module name."""
    generator = torch.Generator().manual_seed(5)
    result = {}
    for name, width in shapes.items():
        x = torch.randn(3 * width, width, generator=generator) @ torch.randn(width, width, generator=generator)
        second = x.T @ x / x.shape[0]
        result[name] = SimpleNamespace(second_moment=second.diagonal().clone() if diagonal else second)
    return result


def expected(weight, dense, moment):
    """Both errors in float64, from the definition with the matrix square root."""
    error, weight = (weight.double() - dense.double()), weight.double()
    moment = moment.double()
    values, vectors = torch.linalg.eigh(torch.diag(moment) if moment.dim() == 1 else moment)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    return float(error.norm() / weight.norm()), float((error @ root).norm() / (weight @ root).norm())


def dense_weights(folder):
    """Module name -> Q + scaling · B A in float64, from the loaded model: PEFT's scaling, not the meter's."""
    model = load(folder, dtype=torch.float32)
    found = {}
    for name, module in model.get_base_model().named_modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, PackedWeight):
            if hasattr(module, "lora_A") and "default" in module.lora_A:
                delta = module.lora_B["default"].weight.double() @ module.lora_A["default"].weight.double()
            else:
                delta = (module.lora_embedding_B["default"].double() @ module.lora_embedding_A["default"].double()).T
            found[name] = base.dequantize().double() + module.scaling["default"] * delta
    return {name: dense.detach() for name, dense in found.items()}


@pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diagonal"])
def test_stories_against_float64(stories_dir, tmp_path, diagonal):
    config = LoftQConfig(bits=2, rank=8, method="loftq", calibration=None, lora_alpha=12, rank_pattern={"down_proj": 3})
    report = quantize_checkpoint(stories_dir, tmp_path / "q", config, progress=False)
    statistics = moments({m.name: m.shape[1] for m in report.modules}, diagonal)
    found = output_errors(tmp_path / "q", stories_dir, statistics)
    weights, dense = load_file(stories_dir / "model.safetensors"), dense_weights(tmp_path / "q")
    assert [m.name for m in found.modules] == [m.name for m in report.modules]
    pairs = []
    for module in found.modules:
        pair = expected(weights[f"{module.name}.weight"], dense[module.name], statistics[module.name].second_moment)
        # float32 products of matrices of at most 172 columns
        assert (module.weight_error, module.output_error) == pytest.approx(pair, rel=1e-4), module.name
        pairs.append(pair)
    assert found.weight_error == pytest.approx(sum(p[0] for p in pairs) / len(pairs), rel=1e-4)
    assert found.output_error == pytest.approx(sum(p[1] for p in pairs) / len(pairs), rel=1e-4)
    assert found.weight_error == pytest.approx(report.mean_error, rel=1e-4)
    alone = output_errors(tmp_path / "q", stories_dir, statistics, use_adapter=False)
    assert alone.weight_error > found.weight_error


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert"])
def test_other_architectures(tmp_path, name):
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "source")
    embeddings = name == "bert"
    config = LoftQConfig(
        bits=3, rank=4, method="loftq", calibration=None, block_size=32, use_rslora=True, quantize_embeddings=embeddings
    )
    report = quantize_checkpoint(tmp_path / "source", tmp_path / "q", config, progress=False)
    found = output_errors(tmp_path / "q", tmp_path / "source", moments({m.name: m.shape[1] for m in report.modules}))
    dense = dense_weights(tmp_path / "q")
    kinds = {m.name: m.kind for m in report.modules}
    assert ("embedding" in kinds.values()) == embeddings
    for module in found.modules:
        layer = model.get_submodule(module.name)
        weight = layer.weight.detach()
        weight = weight.T if is_transposed(layer) else weight
        assert module.weight_error == pytest.approx(
            float((weight - dense[module.name]).norm() / weight.norm()), rel=1e-4
        )
        assert (module.output_error is None) == (kinds[module.name] == "embedding")


def test_without_statistics(stories_dir, tmp_path):
    config = LoftQConfig(bits=4, rank=4, method="qlora", calibration=None)
    report = quantize_checkpoint(stories_dir, tmp_path / "q", config, progress=False)
    found = output_errors(tmp_path / "q", stories_dir)
    assert found.output_error is None
    assert found.weight_error == pytest.approx(report.mean_error, rel=1e-4)
    first = report.modules[0]
    one = ErrorMeter(stories_dir, moments({first.name: first.shape[1]})).measure(tmp_path / "q")
    assert one.output_error == one.modules[0].output_error
    assert one.modules[1].output_error is None


def test_another_source(stories_dir, tmp_path):
    quantize_checkpoint(
        stories_dir, tmp_path / "q", LoftQConfig(bits=4, rank=4, method="qlora", calibration=None), progress=False
    )
    tiny_model("llama").save_pretrained(tmp_path / "other")
    with pytest.raises(SourceError, match="compare a folder with its own source"):
        output_errors(tmp_path / "q", tmp_path / "other")
    tiny_model("bert").save_pretrained(tmp_path / "bert")
    with pytest.raises(SourceError, match="expected the source of the folder"):
        output_errors(tmp_path / "q", tmp_path / "bert")
    with pytest.raises(SourceError, match="no loftq_report"):
        output_errors(tmp_path / "other", tmp_path / "other")


def test_damaged_folder(stories_dir, tmp_path):
    quantize_checkpoint(
        stories_dir, tmp_path / "q", LoftQConfig(bits=4, rank=4, method="qlora", calibration=None), progress=False
    )
    path = tmp_path / "q" / "config.json"
    values = json.loads(path.read_text())
    removed = next(iter(values["quantization_config"]["modules"]))
    del values["quantization_config"]["modules"][removed]
    path.write_text(json.dumps(values))
    with pytest.raises(SourceError, match="quantize again"):
        output_errors(tmp_path / "q", stories_dir)
