"""Bytes alive during a step on shapes alone, against hand-counted operations and against real steps on real tensors."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from peft.helpers import disable_input_dtype_casting
from torch import nn

import loftq
from loftq import ConfigError, LoftQConfig
from loftq.hub.quantizer import packed_like
from loftq.report.memory.simulate import LiveBytes, StepBytes, packed_products_on, simulate_step, workspace_bytes
from loftq.report.memory.training import TrainingSetup, build_model, task_heads
from tiny import CLASSES, MIXTURES, tiny_model

BATCH, LENGTH = 3, 24


def test_live_bytes_of_hand_counted_operations():
    known = torch.zeros(1000)
    with LiveBytes([known]) as count:
        first = known * 2  # 4,000 bytes
        view = first[:10].view(2, 5)  # none
        half = first.half()  # 2,000
        assert (count.live, count.peak) == (6000, 6000)
        known.add_(1)
        del first
        assert count.live == 6000, "the view keeps it"
        del view
        assert (count.live, count.peak) == (2000, 6000)
        half = half * 2  # the new before the old goes
        assert (count.live, count.peak) == (2000, 6000)
        del half
        assert count.live == 0


def test_live_bytes_of_a_hand_counted_step():
    """y = relu(x Wᵀ), L = sum(y): x is an input, W (4, 8) is trained, x (16, 8), y (16, 4) in float32."""
    weight = nn.Parameter(torch.randn(4, 8))
    x = torch.randn(16, 8)
    with LiveBytes([weight, x]) as count:
        y = torch.relu(x @ weight.T)
        assert count.live == 16 * 4 * 4, "of the product only relu's result stays, which its gradient needs"
        loss = y.sum()
        del y
        assert count.live == 16 * 4 * 4 + 4
        loss.backward()
        assert count.live == 4 + 4 * 8 * 4, "the loss and W's gradient"


def test_what_an_operation_takes_besides_counts_while_it_runs():
    x = torch.zeros(100)
    beside = {torch.ops.aten.mul.Tensor: lambda a, b: a.new_empty(1000)}
    with LiveBytes([x], beside) as count:
        y = x * 2
        assert (count.live, count.peak) == (400, 4400)
        del y


def real_step(
    model: nn.Module, ids: torch.Tensor, head: bool, encoder_decoder: bool, autocast: torch.dtype | None = None
) -> StepBytes:
    """The step of ``simulate_step`` with numbers."""
    inputs = {"input_ids": ids}
    if encoder_decoder:
        inputs["decoder_input_ids"] = ids
    if head:
        inputs["labels"] = ids
    casts = disable_input_dtype_casting(model, active=autocast is not None)
    known = [*model.parameters(), *model.buffers(), ids]
    with casts, LiveBytes(known, packed_products_on("cpu")) as count:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            output = model(**inputs)
        loss = output.loss if head else output[0].float().sum()
        del output
        stored = count.live
        loss.backward()
        del loss
    return StepBytes(stored, count.peak, count.live)


STEPS = {"plain": (False, None), "checkpointing": (True, None), "bfloat16": (False, torch.bfloat16)}


@pytest.mark.parametrize(("checkpointing", "autocast"), STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("name", CLASSES)
def test_simulated_step_is_a_real_one(name, checkpointing, autocast):
    """The same operations on tensors with data leave the same bytes alive: to the byte, for every architecture."""
    settings = LoftQConfig(bits=2, rank=4, calibration=None, num_iter=0)
    model = tiny_model(name)
    config = copy.deepcopy(model.config)
    config.architectures = [CLASSES[name]]
    head = model.get_output_embeddings() is not None
    setup = TrainingSetup(dtype="bfloat16" if autocast else "float32")
    simulated = simulate_step(
        build_model(config, settings, setup),
        batch_size=BATCH,
        length=LENGTH,
        checkpointing=checkpointing,
        autocast=autocast,
    )
    heads = task_heads(model)
    trained = loftq.quantize_model(model.to(autocast), settings, progress=False).train()
    for part in heads:
        trained.get_base_model().get_submodule(part).float().requires_grad_(True)
    if checkpointing:
        trained.gradient_checkpointing_enable()
    ids = torch.randint(3, 90, (BATCH, LENGTH))
    real = real_step(trained, ids, head, config.is_encoder_decoder, autocast)
    if name in MIXTURES:  # what is alive at the same time depends on how many tokens an expert happens to get
        assert real.peak == pytest.approx(simulated.peak, rel=0.03)
        real = dataclasses.replace(real, peak=simulated.peak)
    assert real == simulated
    assert bool(heads) == ("Sequence" in CLASSES[name])


def test_dense_copies_of_packed_weights():
    """On the CPU none; elsewhere what plain torch takes."""
    config = tiny_model("llama").config
    config.architectures = ["LlamaForCausalLM"]

    def peak(device: str, dtype: str) -> int:
        model = build_model(config, LoftQConfig(bits=2, rank=4), TrainingSetup(dtype=dtype))
        return simulate_step(model, batch_size=1, length=1, device=device).peak

    # with one token nearly all of the peak is the product with the largest matrix, (100, 64): codes as 64-bit indices,
    # levels and scales in float32, of which at least the indices and the levels are there together
    assert peak("cuda", "float32") - peak("cpu", "float32") > 12 * 6400
    assert peak("cuda", "bfloat16") > peak("cpu", "bfloat16") > 2 * 6400


def test_workspace_is_the_largest_tile():
    spec = loftq.QuantSpec()
    layers = [packed_like(nn.Linear(*shape), spec) for shape in ((64, 32), (64, 100), (10, 10))]
    assert workspace_bytes(nn.ModuleList(layers), "cpu", torch.float64, 1000) == 8 * 64 * 100
    assert workspace_bytes(nn.ModuleList(layers), "cpu", torch.float32, 1000) == 0  # multiplied as it is packed
    assert workspace_bytes(nn.ModuleList(layers), "cuda", torch.float64, 1000) == 0
    assert workspace_bytes(nn.Linear(3, 3), "cpu", torch.float64, 1000) == 0


def test_a_model_without_token_ids_is_refused():
    import transformers

    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    config.architectures = ["ViTModel"]
    with pytest.raises(ConfigError, match="ViTModel cannot be run on token ids") as raised:
        simulate_step(build_model(config, LoftQConfig(rank=2), TrainingSetup()), batch_size=1, length=8)
    assert "\n" not in str(raised.value)
