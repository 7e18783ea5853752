"""Predicted memory of training: hand-computed parts, the documented formula, what a real process grew by."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers

import loftq
from loftq import ConfigError, LoftQConfig, kernels
from loftq.checkpoint.source import open_config
from loftq.report.memory import TrainingSetup, predict_footprint, predict_training
from loftq.report.memory.measure import folder_config
from loftq.report.memory.training import build_model, folder_plans, predict_methods
from tiny import tiny_model

ROOT = Path(__file__).resolve().parents[2]
WIDTH, KEYS, INNER, HEADS, LAYERS, VOCABULARY, RANK = 64, 32, 100, 4, 2, 96, 3


def tiny_config(name: str = "llama"):
    model = tiny_model(name)
    model.config.architectures = [type(model).__name__]
    if name == "llama":
        model.config.max_position_embeddings = 1024
    return model.config


def test_parts_of_each_method():
    config, settings = tiny_config(), LoftQConfig(bits=2, rank=RANK)
    footprint = predict_footprint(config, settings)
    adapters, dense = footprint.adapters.parameters, footprint.model_parameters
    rotary = 4 * 2 * (WIDTH // HEADS // 2)  # inverse frequencies, twice, are buffers that no file holds
    packed, lora, full = (
        predict_training(config, settings, TrainingSetup(method, length=32)) for method in ("loftq", "lora", "full")
    )
    assert packed.weights == footprint.total_bytes + rotary
    assert lora.weights == 4 * (dense + adapters) + rotary
    assert full.weights == 4 * dense + rotary
    assert (packed.trainable, lora.trainable, full.trainable) == (adapters, adapters, dense)
    assert [m.optimizer for m in (packed, lora, full)] == [8 * m.trainable for m in (packed, lora, full)]
    for memory in (packed, lora, full):
        parts = (memory.weights, memory.optimizer, memory.activations, memory.transient, memory.workspace)
        assert memory.peak == sum(parts)
        assert memory.to_dict()["peak"] == memory.peak


def test_weights_in_16_bits_and_adapters_in_32():
    config, settings = tiny_config("bert"), LoftQConfig(bits=2, rank=RANK)
    memory = predict_training(config, settings, TrainingSetup(length=64, dtype="bfloat16"))
    footprint = predict_footprint(config, settings, dtype="bfloat16")
    positions = 2 * 8 * 64  # BERT's buffers position_ids and token_type_ids, which no file holds
    assert memory.weights == footprint.total_bytes + positions


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_weights_are_trained_in_float32(dtype):
    """Whatever the dtype of the computation, as in training: see test_misfortune's test of the same name."""
    full = predict_training(tiny_config("bert"), LoftQConfig(), TrainingSetup("full", length=64, dtype=dtype))
    assert full.weights == 4 * full.trainable + 2 * 8 * 64  # its buffers of positions
    assert full.optimizer == 2 * 4 * full.trainable


def test_heads_are_trained_in_float32():
    """A classifier beside the adapters: PEFT keeps the loaded one in 16 bits and trains a copy."""
    settings, setup = LoftQConfig(bits=2, rank=RANK), TrainingSetup(length=32, dtype="bfloat16")
    config = tiny_config("deberta-v2")
    footprint = predict_footprint(config, settings, dtype="bfloat16")
    found = predict_training(config, settings, setup)
    head = WIDTH * (WIDTH + 1) + 2 * (WIDTH + 1)  # pooler and classifier
    assert found.trainable == footprint.adapters.parameters + head
    positions = 8 * 64  # position_ids, a buffer that no file holds
    assert found.weights == footprint.total_bytes + 4 * head + positions
    model = build_model(config, settings, setup)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


# The formulas of the module's docstring: bytes of a token in one layer.
PER_TOKEN = {
    "float32": 4 * (6 * WIDTH + 2 * KEYS + 4 * INNER + 7 * RANK + HEADS + 2),
    "bfloat16": 16 * WIDTH + 4 * KEYS + 8 * INNER + 14 * RANK + 4 * HEADS + 8,
}


@pytest.mark.parametrize("dtype", PER_TOKEN)
@pytest.mark.parametrize("method", ["loftq", "lora"])
def test_formula_of_a_llama_layer(method, dtype):
    """What a third layer leaves for the backward pass, to the byte."""
    config, settings = tiny_config(), LoftQConfig(bits=2, rank=RANK)
    stored = []
    for layers in (2, 3):
        config.num_hidden_layers = layers
        stored.append(predict_training(config, settings, TrainingSetup(method, 2, 250, dtype)).activations)
    # what autocast makes of A and B
    factors = RANK * (4 * WIDTH + 2 * (WIDTH + KEYS) + 3 * (WIDTH + INNER)) * 2 if dtype == "bfloat16" else 0
    assert stored[1] - stored[0] == 500 * PER_TOKEN[dtype] + factors


@pytest.mark.parametrize(("device", "mask"), [("cuda", 1), ("cpu", 4)])
def test_dropout_keeps_a_mask_and_its_result(device, mask):
    """Of the input of every A: seven of width h, or f for the last."""
    config, stored = tiny_config(), []
    for dropout in (0.0, 0.1):
        settings = LoftQConfig(rank=RANK, lora_dropout=dropout)
        stored.append(predict_training(config, settings, TrainingSetup(length=200, device=device)).activations)
    inputs = LAYERS * 200 * (6 * WIDTH + INNER)
    first = 200 * 3 * WIDTH  # before the first adapters nothing needs a gradient, and so no mask
    shared = LAYERS * 200 * (2 * WIDTH + INNER)  # what several A kept together: both norms' results, the feed-forward's
    assert stored[1] - stored[0] == 4 * inputs + mask * (inputs - first) - 4 * shared


def test_formula_of_a_llama_model():
    """Layers and loss; the last norm leaves its input, the first, before which nothing is trained, does not."""
    found = predict_training(tiny_config(), LoftQConfig(rank=RANK), TrainingSetup("lora", length=500)).activations
    rotary = 2 * 4 * 500 * WIDTH // HEADS  # cosines and sines, shared by all layers
    loss = 4 * 500 * VOCABULARY + 8 * 500  # log-softmax, labels
    assert found == pytest.approx(LAYERS * 500 * PER_TOKEN["float32"] + rotary + loss, rel=1e-3)


def test_checkpointing_leaves_a_layer_its_input():
    settings, setup = LoftQConfig(bits=2, rank=RANK), {"batch_size": 2, "length": 256, "checkpointing": True}
    stored = []
    for layers in (2, 12):
        config = tiny_config()
        config.num_hidden_layers = layers
        stored.append(predict_training(config, settings, TrainingSetup(**setup)).activations)
    assert stored[1] - stored[0] == pytest.approx(10 * 4 * 512 * WIDTH, rel=0.01)


def test_logits_dominate_small_models():
    config = tiny_config()
    config.vocab_size = 30_000
    found = predict_training(config, LoftQConfig(rank=RANK), TrainingSetup(batch_size=4, length=128))
    logits = 4 * 512 * 30_000  # in float32
    assert logits < found.activations < 1.2 * logits
    # at the peak the gradients of the log-softmax and of the logits
    assert found.transient == pytest.approx(2 * logits, rel=0.01)


def test_adam_can_be_the_peak():
    """One token: hardly any activations, so the peak is in AdamW's step: all gradients, and its temporaries."""
    config = tiny_config()
    full = {
        d: predict_training(config, LoftQConfig(), TrainingSetup("full", length=1, device=d)) for d in ("cuda", "cpu")
    }
    gradients = 4 * full["cuda"].trainable
    assert full["cuda"].activations + full["cuda"].transient == pytest.approx(2 * gradients, rel=0.01)
    largest = 4 * INNER * WIDTH
    assert full["cpu"].activations + full["cpu"].transient == pytest.approx(gradients + 2 * largest, rel=0.01)


def test_eager_attention_keeps_the_scores():
    config, settings = tiny_config(), LoftQConfig(rank=RANK)
    fused, eager = (
        predict_training(config, settings, TrainingSetup(length=300, attention=a)).activations for a in (None, "eager")
    )
    scores = 4 * HEADS * 300 * 300
    # the softmax's result for its gradient and for the product's, one a layer; keys and values repeated for all heads
    assert LAYERS * scores < eager - fused < 1.35 * LAYERS * scores, (eager - fused) / scores


def test_workspace_on_the_cpu_alone(monkeypatch):
    config, settings = tiny_config(), LoftQConfig(rank=RANK)
    assert predict_training(config, settings, TrainingSetup(device="cpu")).workspace == 0  # nothing is written out
    monkeypatch.setattr(kernels, "few_tokens", lambda device_type, dtype: 16)
    assert predict_training(config, settings, TrainingSetup(device="cpu")).workspace == 4 * INNER * WIDTH
    assert predict_training(config, settings, TrainingSetup(device="cuda")).workspace == 0
    assert predict_training(config, settings, TrainingSetup("lora", device="cpu")).workspace == 0


def test_a_folder_tells_what_its_configuration_does(tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path / "source")
    options = {"bits": 2, "rank": 4, "bits_pattern": {"c_proj": 8}, "rank_pattern": {"c_fc": 2}, "calibration": None}
    settings = LoftQConfig(num_iter=0, **options)
    loftq.quantize_checkpoint(tmp_path / "source", tmp_path / "out", settings, progress=False)
    plans = folder_plans(tmp_path / "out")
    assert {p.spec.bits for n, p in plans.items() if n.endswith("c_proj")} == {8}
    setup = TrainingSetup(length=64)
    of_folder = predict_training(folder_config(tmp_path / "out"), settings, setup, plans)
    assert of_folder == predict_training(open_config(tmp_path / "source"), settings, setup)


def test_methods_side_by_side():
    found, problem = predict_methods(tiny_config(), LoftQConfig(rank=2), TrainingSetup(length=16))
    assert ([m.setup.method for m in found], problem) == (["loftq", "lora", "full"], None)
    assert {m.setup.dtype for m in found} == {"float32"}
    vision = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, architectures=["ViTModel"]
    )
    found, problem = predict_methods(vision, LoftQConfig(rank=2), TrainingSetup())
    assert found == []
    assert "cannot be run on token ids" in problem


def test_a_model_that_needs_its_mask():
    """Falcon adds its mask to the attention scores, fused or not: the step is counted with one."""
    config = transformers.FalconConfig(vocab_size=96, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    config.architectures = ["FalconForCausalLM"]
    short, long = (
        predict_training(config, LoftQConfig(rank=2), TrainingSetup(length=n)).activations for n in (100, 200)
    )
    scores = 4 * 200 * 200  # a mask in float32 at least, which grows with the square of the length
    assert long - 2 * short > scores / 4


def test_a_module_that_peft_refuses():
    config = transformers.MambaConfig(vocab_size=96, hidden_size=64, num_hidden_layers=1)
    config.architectures = ["MambaForCausalLM"]
    predict_footprint(config, LoftQConfig(rank=2))
    with pytest.raises(ConfigError, match=r"adapters cannot be put into the model .*choose other target modules"):
        predict_training(config, LoftQConfig(rank=2), TrainingSetup(length=8))


def test_a_sequence_that_the_model_has_no_positions_for():
    """Indices are not looked at, so an embedding of too few positions would not be noticed otherwise."""
    config = tiny_config("gpt2")
    config.n_positions = 64
    setup = TrainingSetup(length=65)
    for predict in (predict_training, predict_methods):
        with pytest.raises(
            ConfigError, match=r"length is 65, but the model has positions for 64 tokens; lower --length"
        ):
            predict(config, LoftQConfig(rank=2), setup)


def test_nothing_of_the_configuration_changes():
    config = tiny_config()
    before = config.to_dict()
    predict_training(config, LoftQConfig(rank=2), TrainingSetup(length=8, checkpointing=True, attention="eager"))
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "qlora"}, "method is 'qlora', expected one of loftq, lora, full"),
        ({"batch_size": 0}, "batch_size is 0, expected an integer of at least 1"),
        ({"length": -1}, "length is -1"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"device": "tpu"}, "device is 'tpu', expected one of cuda, cpu"),
        ({"attention": "flash"}, "attention is 'flash'"),
        ({"checkpointing": "no"}, "checkpointing is 'no', expected True or False"),
    ],
)
def test_wrong_setups(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainingSetup(**options)


@pytest.mark.slow  # a minute: four processes that import everything
def test_a_process_grows_as_predicted(stories_dir, tmp_path, monkeypatch):
    """Resident memory over three steps of a real model, within 20 %."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("training_memory", ROOT / "benchmarks" / "training_memory.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    folder = benchmark.quantized(stories_dir, tmp_path)
    options = {"batch_size": 8, "length": 512, "dtype": "float32", "allocators": ("returning",)}
    for row in benchmark.rows(stories_dir, folder, **options):
        ratio = row["predicted"]["peak"] / row["measured"]["returning"]
        assert 0.8 < ratio < 1.2, f"{row['method']}, checkpointing {row['checkpointing']}: {ratio:.2f} of the measured"


def test_memory_is_counted_not_allocated():
    """A model of 7 billion parameters on a machine that could not hold it: no weight exists."""
    config = open_config(ROOT / "src/loftq/recipes/models/llama-2-7b")
    config.num_hidden_layers = 4  # the layers are alike; fewer take less time
    before = torch.get_rng_state()
    found = predict_training(config, LoftQConfig(bits=4, rank=64), TrainingSetup(length=384))
    assert found.weights > 1e9
    assert torch.equal(before, torch.get_rng_state())
