"""Loading, saving, training and merging through transformers and PEFT, on a real small model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loftq
from loftq.hub.backbone import backbone_sha256
from loftq.modules import PackedWeight, QuantLinear
from tiny import densify, tiny_model

RANK = 8


@pytest.fixture(scope="module")
def quantized(stories_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "stories-2bit"
    loftq.quantize_checkpoint(stories_dir, out, loftq.LoftQConfig(bits=2, rank=RANK))
    return out


@pytest.fixture(scope="module")
def tokens(stories_dir):
    return {name: ids.long() for name, ids in load_file(stories_dir / "tokens.safetensors").items()}


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens["eval"][None, :200]).logits


def test_logits_equal_dense(quantized, stories_dir, tokens):
    from transformers import AutoModelForCausalLM

    loaded = loftq.load(quantized)
    dense = densify(AutoModelForCausalLM.from_pretrained(stories_dir), loaded)
    worst = (logits(loaded, tokens) - logits(dense, tokens)).abs().max()
    assert worst < 1e-4, f"largest difference {worst:.2e}"


def test_load_is_from_pretrained_twice(quantized, tokens):
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM

    expected = logits(loftq.load(quantized), tokens)
    base = AutoModelForCausalLM.from_pretrained(quantized)
    two_steps = PeftModel.from_pretrained(base, quantized, subfolder="loftq_init")
    assert torch.equal(logits(two_steps, tokens), expected)
    one_step = AutoPeftModelForCausalLM.from_pretrained(quantized / "loftq_init")
    assert torch.equal(logits(one_step, tokens), expected)


def test_memory_of_the_loaded_layers_is_their_packed_size(quantized):
    report = loftq.QuantizationReport.load(quantized)
    layers = [m for m in loftq.load(quantized).modules() if isinstance(m, PackedWeight)]
    held = sum(b.numel() * b.element_size() for layer in layers for b in layer.buffers())
    assert held == report.weight_bytes
    assert all(not list(layer.parameters(recurse=False)) for layer in layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_scales_and_codebooks(quantized, dtype):
    exact = {n: b for n, b in loftq.load(quantized).named_buffers() if "weight" in n}
    loaded = dict(loftq.load(quantized, dtype=dtype).named_buffers())
    for name, buffer in exact.items():
        assert torch.equal(loaded[name], buffer), name


def test_save_pretrained_gives_the_same_bytes(quantized, tmp_path):
    from loftq.hub.load import load_backbone

    load_backbone(quantized).save_pretrained(tmp_path)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (quantized / name).read_bytes(), name


def test_adapter_files_are_standard(quantized):
    config = json.loads((quantized / "loftq_init/adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (RANK, RANK, "LORA")
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert config["auto_mapping"]["loftq_backbone_sha256"] == backbone_sha256(quantized)


def train(model, tokens, out, steps, **arguments):
    from transformers import Trainer, TrainingArguments

    windows = tokens["train"][: 64 * 128].view(64, 128)
    data = [{"input_ids": w, "labels": w} for w in windows]
    args = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **arguments,
    )
    trainer = Trainer(model=model, args=args, train_dataset=data)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient-checkpointing"])
def test_training_lowers_the_loss_saves_and_reloads(quantized, tokens, tmp_path, checkpointing):
    model = loftq.load(quantized, trainable=True)
    packed = {n: b.clone() for n, b in model.named_buffers() if n.endswith(".weight")}
    losses = train(model, tokens, tmp_path / "run", steps=20, gradient_checkpointing=checkpointing)
    first, last = sum(losses[:4]) / 4, sum(losses[-4:]) / 4
    assert last < first - 0.02, f"loss went from {first:.3f} to {last:.3f}"
    assert packed
    assert all(torch.equal(dict(model.named_buffers())[n], b) for n, b in packed.items()), "the backbone changed"

    model.save_pretrained(tmp_path / "adapter")
    model.eval()
    reloaded = loftq.load(quantized, adapter=tmp_path / "adapter")
    assert torch.equal(logits(reloaded, tokens), logits(model, tokens))


def test_merged_model_equals_backbone_with_adapter(quantized, tokens, tmp_path):
    from transformers import AutoModelForCausalLM

    loftq.export_dense(quantized, tmp_path / "dense", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not any(isinstance(m, PackedWeight) for m in merged.modules())
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    torch.testing.assert_close(logits(merged, tokens), logits(loftq.load(quantized), tokens), rtol=0, atol=1e-4)


def test_trained_adapter_merges_into_its_backbone_only(quantized, stories_dir, tokens, tmp_path):
    model = loftq.load(quantized, trainable=True)
    train(model, tokens, tmp_path / "run", steps=2)
    model.save_pretrained(tmp_path / "adapter")
    loftq.export_dense(quantized, tmp_path / "dense", adapter=tmp_path / "adapter", dtype="float32")

    other = tmp_path / "other"
    loftq.quantize_checkpoint(stories_dir, other, loftq.LoftQConfig(bits=3, rank=RANK, num_iter=1))
    with pytest.raises(loftq.BackboneMismatchError, match="belongs to backbone"):
        loftq.export_dense(other, tmp_path / "wrong", adapter=tmp_path / "adapter")
    assert not (tmp_path / "wrong").exists()


def test_adapter_of_another_backbone_is_not_loaded(quantized, stories_dir, tmp_path):
    loftq.quantize_checkpoint(stories_dir, tmp_path / "other", loftq.LoftQConfig(bits=3, rank=RANK, num_iter=0))
    with pytest.raises(loftq.BackboneMismatchError, match="it was trained on"):
        loftq.load(quantized, adapter=tmp_path / "other/loftq_init")


def test_export_leaves_neighbours_alone(quantized, tmp_path):
    neighbour = tmp_path / "dense.incomplete"
    neighbour.mkdir()
    (neighbour / "thesis.tex").write_text("precious")
    loftq.export_dense(quantized, tmp_path / "dense")
    assert (neighbour / "thesis.tex").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "dense.incomplete"]


def test_adapter_without_a_recorded_backbone(quantized, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(quantized / "loftq_init", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["auto_mapping"] = None
    config["base_model_name_or_path"] = "some/other-model"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(loftq.BackboneMismatchError, match="some/other-model"):
        loftq.export_dense(quantized, tmp_path / "dense", adapter=adapter)


def test_dequantized_by_transformers(quantized, tokens):
    from loftq.hub.load import load_backbone

    packed = load_backbone(quantized)
    expected = logits(packed, tokens)
    dense = packed.dequantize()
    assert not any(isinstance(m, PackedWeight) for m in dense.modules())
    torch.testing.assert_close(logits(dense, tokens), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 8], ids=["other-shape", "extra-dimension"])
def test_without_registration_loading_fails_hard(stories_dir, tmp_path, bits):
    out = tmp_path / "out"
    loftq.quantize_checkpoint(stories_dir, out, loftq.LoftQConfig(bits=bits, rank=2, num_iter=0))
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "ignore_mismatched_sizes" in done.stderr


def test_import_order_does_not_matter(quantized):
    code = (
        f"import sys; import loftq; assert 'torch' not in sys.modules; from transformers import AutoModelForCausalLM as A; "
        f"m = A.from_pretrained({str(quantized)!r}); print(type(m.model.layers[0].mlp.up_proj).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == QuantLinear.__name__


def test_backbone_loads_under_another_head(tmp_path):
    import transformers

    tiny_model("bert").save_pretrained(tmp_path / "source")
    loftq.quantize_checkpoint(tmp_path / "source", tmp_path / "out", loftq.LoftQConfig(bits=2, rank=2))
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out")
    assert isinstance(model.bert.encoder.layer[0].attention.self.query, QuantLinear)
    assert isinstance(model.classifier, torch.nn.Linear)
    assert not isinstance(model.classifier, QuantLinear)


@pytest.mark.parametrize("damage", ["missing-tensor", "no-adapter", "not-quantized", "newer-format"])
def test_damaged_folders(quantized, stories_dir, tmp_path, damage):
    folder = tmp_path / "folder"
    shutil.copytree(stories_dir if damage == "not-quantized" else quantized, folder)
    config = json.loads((folder / "config.json").read_text())
    if damage == "missing-tensor":
        from safetensors.torch import load_file, save_file

        (folder / "model.safetensors").chmod(0o644)
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight_scale"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    elif damage == "no-adapter":
        shutil.rmtree(folder / "loftq_init")
    elif damage == "newer-format":
        config["quantization_config"]["format_version"] = 99
        (folder / "config.json").write_text(json.dumps(config))
    expected = {
        "missing-tensor": "lacks model.layers.1.mlp.up_proj.weight_scale",
        "no-adapter": "has no adapter_config.json",
        "not-quantized": "is no quantized folder",
        "newer-format": "format_version 99",
    }[damage]
    with pytest.raises(loftq.SourceError, match=expected):
        loftq.load(Path(folder))
