"""Training in 16 bits and what is special on a GPU, as far as a machine without one can tell."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from loftq.data.collate import Collator
from loftq.data.examples import Example, as_ids
from loftq.data.prepare import DataSettings
from loftq.errors import ConfigError
from loftq.finetune.measure import evaluate_task
from loftq.finetune.model import build, find_start, load_dtype
from loftq.finetune.run import train
from loftq.finetune.settings import TrainSettings
from loftq.finetune.trainer import enough_memory, training_arguments
from loftq.finetune.watch import WINDOW, Divergence


def settings(data: str, **changes) -> TrainSettings:
    held = DataSettings("completion", data)
    return TrainSettings(**{"data": held, "eval_data": held, "epochs": 1, "batch_size": 12, **changes})


@pytest.fixture
def on_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)


class Recorded:
    """Takes transformers' arguments without setting up a device."""

    def __init__(self, **options: Any) -> None:
        self.__dict__.update(options, n_gpu=2, _n_gpu=2)


@pytest.mark.parametrize(
    ("dtype", "bf16", "fp16"),
    [("auto", True, False), ("bfloat16", True, False), ("float16", False, True), ("float32", False, False)],
)
def test_arguments_on_a_gpu(monkeypatch, on_gpu, tmp_path, dtype, bf16, fp16):
    monkeypatch.setattr("loftq.finetune.trainer.TrainingArguments", Recorded)
    found = training_arguments(settings("x", dtype=dtype), tmp_path, "perplexity", False)
    assert (found.bf16, found.fp16) == (bf16, fp16)
    assert found.dataloader_pin_memory
    assert not found.use_cpu
    assert found._n_gpu == 1, "a second GPU would make steps of twice the batch size"


def test_arguments_on_the_cpu(tmp_path):
    found = training_arguments(settings("x", dtype="float16"), tmp_path, None, False)
    assert (found.bf16, found.fp16, found.use_cpu, found.dataloader_pin_memory) == (False, False, True, False)


def test_dtype_of_a_gpu_without_bfloat16(monkeypatch, on_gpu):
    assert load_dtype("auto") == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert load_dtype("auto") == torch.float32
    assert load_dtype("float16") == torch.float16


@pytest.mark.parametrize("gpu", [True, False])
def test_what_float16_trains_is_float32(request, bert, gpu):
    """The gradient scaler refuses gradients in float16, and in float16 AdamW divides by an epsilon of 0."""
    if gpu:
        request.getfixturevalue("on_gpu")
    chosen = TrainSettings(DataSettings("classification", "x"), dtype="float16")
    model, _ = build(find_start("loftq", bert, None), chosen, ["a", "b"])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.float16 in {p.dtype for p in model.parameters()}


def logged(guard: Divergence, count: int, fp16: bool, grad_norm: float) -> None:
    for step in range(count):
        control = SimpleNamespace(should_training_stop=False)
        state = SimpleNamespace(global_step=step)
        guard.on_log(SimpleNamespace(fp16=fp16), state, control, {"loss": 2.0, "grad_norm": grad_norm})


def test_overflows_of_float16_do_not_end_a_run():
    """The scaler begins at 2¹⁶ and halves until the gradient is finite; those steps are left out."""
    guard = Divergence()
    for _ in range(3):
        logged(guard, WINDOW, True, float("inf"))
        logged(guard, 1, True, 1.0)
    assert guard.reason is None
    logged(guard, WINDOW + 1, True, float("inf"))
    assert guard.reason == f"the gradient is no finite number at step {WINDOW}"
    guard = Divergence()
    logged(guard, 1, False, float("inf"))
    assert guard.reason == "the gradient is no finite number at step 0"


@pytest.mark.parametrize(("limit", "width"), [(None, 16), (13, 13), (20, 16), (11, 11)])
def test_lengths_are_rounded_up_within_the_positions(limit, width):
    examples = [Example(as_ids(range(n)), np.arange(n, dtype=np.int32), "") for n in (3, 11)]
    batch = Collator("completion", 0, multiple_of=8, limit=limit)(examples)
    assert {k: v.shape for k, v in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (2, width)
    )


@pytest.mark.parametrize("method", ["loftq", "full"])
def test_a_run_in_bfloat16_is_measured_alike_before_after_and_again(llama, sums, tmp_path, method):
    """Not under the autocast that training leaves around the model's forward pass."""
    where = {"model": str(llama.parent / "source")} if method == "full" else {"init_from": llama}
    chosen = settings(sums, method=method, dtype="bfloat16", metrics=("perplexity", "exact_match"), max_new_tokens=3)
    # a rate too small to change anything
    still = train(tmp_path / "still", chosen.replace(learning_rate=1e-12), progress=False, **where)
    assert still.after["perplexity"] == pytest.approx(still.before["perplexity"], rel=1e-6)
    moved = train(tmp_path / "run", chosen.replace(learning_rate=5e-3), progress=False, **where)
    assert moved.after["perplexity"] < moved.before["perplexity"]
    again, _, _ = evaluate_task(str(tmp_path / "run"), {}, progress=False)
    assert again.metrics == pytest.approx(moved.after, rel=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_curve_in_16_bits_is_that_of_float32(llama, sums, tmp_path, dtype):
    """To the products' rounding: half an ulp, 2⁻⁹ of each in bfloat16, adds up to some thousandths of the loss.

    In float16 on the CPU too, where neither accelerate nor PEFT keeps what is trained in float32.
    """
    chosen = settings(sums, eval_data=None, max_steps=5, learning_rate=5e-3)
    curves = {}
    for name in ("float32", dtype):
        record = train(tmp_path / name, chosen.replace(dtype=name), init_from=llama, progress=False)
        curves[name] = [c["loss"] for c in record.curve]
    print(curves)
    assert curves["float32"][-1] < 0.95 * curves["float32"][0]
    assert curves[dtype] == pytest.approx(curves["float32"], rel=0.02)
    kept = load_file(tmp_path / dtype / "adapter_model.safetensors")
    assert {t.dtype for t in kept.values()} == {torch.float32}


def test_gradient_checkpointing_computes_activations_again_and_the_same(llama, sums, tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls: list[bool] = []
    original = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda *a, **k: calls.append(torch.is_grad_enabled()) or original(*a, **k))
    curves = {}
    for checkpointing in (False, True):
        calls.clear()
        chosen = settings(sums, eval_data=None, max_steps=2, learning_rate=5e-3, gradient_checkpointing=checkpointing)
        record = train(tmp_path / str(checkpointing), chosen, init_from=llama, progress=False)
        curves[checkpointing] = [c["loss"] for c in record.curve]
        assert sum(calls) == 2 * 2 * (1 + checkpointing), "steps × layers, and once more in the backward pass"
    assert curves[True] == pytest.approx(curves[False], rel=1e-5)


def test_a_model_that_cannot_compute_activations_again(llama, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match=r"gradient_checkpointing is on, but LlamaForCausalLM .*; turn it off"):
        build(find_start("loftq", llama, None), settings("x", gradient_checkpointing=True))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory_is_one_sentence(error):
    with pytest.raises(ConfigError, match=r"training ran out of memory \(.*\); lower --batch-size"), enough_memory():
        raise error


def test_other_errors_are_not_taken_for_it():
    with pytest.raises(RuntimeError, match="shapes"), enough_memory():
        raise RuntimeError("shapes do not fit")
