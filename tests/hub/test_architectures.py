"""Every architecture: quantize a checkpoint, load it, and compare with a dense model that holds Q + scaling * B A."""

import pytest
import torch

import loftq
from loftq.modules import PackedModule, QuantEmbedding
from tiny import CLASSES, densify, first_output, tiny_model


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(("bits", "codebook"), [(2, "lloyd"), (4, "lloyd"), (3, "lloyd-channel")])
def test_loaded_equals_dense(name, bits, codebook, tmp_path):
    original = tiny_model(name)
    original.save_pretrained(tmp_path / "source")
    # rows are looked up with their own levels; the other models' heads share the table
    embeddings = codebook == "lloyd-channel" and name in ("llama", "bert", "deberta-v2")
    config = loftq.LoftQConfig(bits=bits, rank=8, num_iter=2, codebook=codebook, quantize_embeddings=embeddings)
    report = loftq.quantize_checkpoint(tmp_path / "source", tmp_path / "out", config)
    loaded = loftq.load(tmp_path / "out")
    packed = sum(m.packed_weights for m in loaded.modules() if isinstance(m, PackedModule))
    assert packed == sum(record.numel for record in report.modules) > 0

    before = first_output(original, name)
    actual = first_output(loaded, name)
    expected = first_output(densify(original, loaded), name)
    worst = (actual - expected).abs().max()
    assert worst < 1e-4, f"largest difference {worst:.2e}"
    assert not torch.allclose(expected, before, atol=1e-3), "quantization changed nothing"


@pytest.mark.parametrize("name", CLASSES)
def test_export_is_a_plain_checkpoint(name, tmp_path):
    original = tiny_model(name)
    original.save_pretrained(tmp_path / "source")
    loftq.quantize_checkpoint(tmp_path / "source", tmp_path / "out", loftq.LoftQConfig(bits=4, rank=8, num_iter=1))
    loftq.export_dense(tmp_path / "out", tmp_path / "dense", dtype="float32")
    exported, info = type(original).from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not info["missing_keys"]
    actual, expected = first_output(exported, name), first_output(loftq.load(tmp_path / "out"), name)
    assert (actual - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["bert", "deberta-v2"])
def test_quantized_embeddings(name, tmp_path):
    original = tiny_model(name)
    original.save_pretrained(tmp_path / "source")
    config = loftq.LoftQConfig(bits=4, rank=8, quantize_embeddings=True)
    loftq.quantize_checkpoint(tmp_path / "source", tmp_path / "out", config)
    loaded = loftq.load(tmp_path / "out")
    assert any(isinstance(m, QuantEmbedding) for m in loaded.modules())
    actual = first_output(loaded, name)
    expected = first_output(densify(original, loaded), name)
    assert (actual - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", CLASSES)
def test_live_model_equals_checkpoint(name, tmp_path):
    """``quantize_model`` and ``quantize_checkpoint`` give the same layers and adapters."""
    config = loftq.LoftQConfig(bits=3, rank=4, num_iter=2)
    tiny_model(name).save_pretrained(tmp_path / "source")
    loftq.quantize_checkpoint(tmp_path / "source", tmp_path / "out", config)
    live = loftq.quantize_model(tiny_model(name), config)
    loaded = loftq.load(tmp_path / "out")
    torch.testing.assert_close(first_output(live, name), first_output(loaded, name), rtol=0, atol=1e-5)
    assert any(p.requires_grad for p in live.parameters())
