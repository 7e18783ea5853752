"""A run of several processes: the same steps, losses and result as with one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import SequentialSampler

import loftq
from loftq.cli import app
from loftq.data.collate import Collator
from loftq.data.examples import IGNORED, Example
from loftq.finetune import processes
from loftq.finetune.processes import Shared, Shares, collated
from loftq.finetune.record import TrainingRecord

# What `accelerate launch` makes of docs/cluster.md's fsdp2.yaml.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",  # is turned off
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",  # likewise
}

# Stops like a power cut after a step of the first process, with a checkpoint behind it.
CRASHING = """
import os, signal, sys
from loftq.cli import main
from loftq.finetune import training

class Crash(training.Progress):
    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step == 4 and os.environ.get("CRASH"):
            os.kill(os.getpid(), signal.SIGKILL)

training.Progress = Crash
main()
"""

# Writes, after the first step, which part of its packed bytes a process holds itself.
WEIGHING = """
import os, sys
from pathlib import Path
from torch.distributed.tensor import DTensor
from loftq.cli import main
from loftq.finetune import training
from loftq.modules import PackedModule

class Weigh(training.Progress):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step > 1:
            return
        held = whole = 0
        for module in model.modules():
            if isinstance(module, PackedModule):
                for packed in (getattr(module, name) for name in getattr(module, "specs", ["weight"])):
                    whole += packed.numel()
                    held += (packed.to_local() if isinstance(packed, DTensor) else packed).numel()
        Path(os.environ["WEIGHED"] + os.environ["RANK"]).write_text(str(held / whole))

training.Progress = Weigh
main()
"""


def launched(arguments: list[str], *start: str, processes: int = 2, **environment: str) -> subprocess.CompletedProcess:
    """``torchrun`` with that many CPU processes; ``start`` in place of loftq's module."""
    path = os.pathsep.join([str(Path(loftq.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launcher, *(start or ("-m", "loftq.cli")), "train", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in TrainingRecord.load(run).curve]


def furthest(run: Path, other: Path) -> float:
    found, expected = losses(run), losses(other)
    assert len(found) == len(expected) > 4
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


def weights(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "adapter_model.safetensors")


def without_dropout(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}), "utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama", "mixture"])
@pytest.mark.parametrize("spread", [{}, FSDP2], ids=["DDP", "FSDP2"])
def test_two_processes_train_as_one(model, sums, tmp_path, spread, request, capsys):
    """36 examples in batches of 5: shares of 2 and 3, and at an epoch's end one example for two processes. In a mixture each
    process has tokens for other experts."""
    folder = request.getfixturevalue(model)
    options = ["--init-from", folder, "--task", "completion", "--data", sums, "--eval-data", sums, "--lr", "1e-2"]
    options += ["--epochs", "2", "--batch-size", "5", "--gradient-accumulation", "2"]
    app(["train", str(tmp_path / "one"), *map(str, options)], standalone_mode=False)
    script = tmp_path / "weighing.py"
    script.write_text(WEIGHING, encoding="utf-8")
    done = launched([tmp_path / "two", *options], str(script), WEIGHED=str(tmp_path / "weighed"), **spread)
    assert done.returncode == 0, done.stderr[-3000:]
    parts = [float((tmp_path / f"weighed{rank}").read_text()) for rank in range(2)]
    assert parts == pytest.approx([0.5, 0.5] if spread else [1, 1], abs=0.01)
    assert done.stdout.count("weights trained") == 1, "one process speaks"
    one, two = TrainingRecord.load(tmp_path / "one"), TrainingRecord.load(tmp_path / "two")
    assert two.machine["processes"] == 2
    assert furthest(tmp_path / "two", tmp_path / "one") < 1e-3  # 5e-7 was measured; Adam may magnify a rounding
    assert two.before["loss"] == pytest.approx(one.before["loss"], abs=1e-4)
    assert two.after["loss"] == pytest.approx(one.after["loss"], abs=1e-3)
    assert [e["step"] for e in two.evaluations] == [e["step"] for e in one.evaluations]
    expected = weights(tmp_path / "one")
    for name, found in weights(tmp_path / "two").items():
        assert found.shape == expected[name].shape
        assert float((found - expected[name]).norm() / expected[name].norm()) < 1e-2, name


@pytest.mark.slow
def test_means_over_examples_are_of_the_whole_batch(bert, letters_a_or_b, tmp_path, capsys):
    """A classifier's loss is a mean: shares of 3, 4 and 4 examples must count as such."""
    import shutil

    folder = tmp_path / "q"
    shutil.copytree(bert, folder)
    without_dropout(folder)
    options = ["--init-from", folder, "--task", "classification", "--data", letters_a_or_b]
    options += ["--epochs", "2", "--batch-size", "11", "--lr", "1e-2"]
    app(["train", str(tmp_path / "one"), *map(str, options)], standalone_mode=False)
    done = launched([tmp_path / "three", *options], processes=3)
    assert done.returncode == 0, done.stderr[-3000:]
    assert furthest(tmp_path / "three", tmp_path / "one") < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("spread", [{}, FSDP2], ids=["DDP", "FSDP2"])
def test_an_interrupted_run_continues(llama, sums, tmp_path, spread):
    script = tmp_path / "crashing.py"
    script.write_text(CRASHING, encoding="utf-8")
    options = ["--init-from", llama, "--task", "completion", "--data", sums, "--lr", "1e-2", "--max-steps", "6"]
    options += ["--batch-size", "8", "--eval-steps", "3"]
    whole = launched([tmp_path / "whole", *options], **spread)
    assert whole.returncode == 0, whole.stderr[-3000:]
    cut = launched([tmp_path / "cut", *options], str(script), CRASH="1", **spread)
    assert cut.returncode != 0
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()] == ["checkpoint-3"]
    done = launched([tmp_path / "cut", *options], str(script), **spread)
    assert done.returncode == 0, done.stderr[-3000:]
    assert furthest(tmp_path / "cut", tmp_path / "whole") < 1e-5
    assert not (tmp_path / "cut" / "checkpoints").exists()


@pytest.mark.slow
def test_a_mistake_is_said_once(llama, tmp_path):
    done = launched([tmp_path / "run", "--init-from", llama, "--task", "completion", "--data", tmp_path / "absent"])
    assert done.returncode != 0
    assert done.stderr.count("loftq: ") == 1, done.stderr[-3000:]


def test_every_example_once(sums):
    for count, size, among in ((36, 5, 2), (36, 8, 3), (7, 4, 4), (1, 8, 3)):
        shares = list(Shares(SequentialSampler(range(count)), size, among))
        assert len(shares) == len(Shares(SequentialSampler(range(count)), size, among))
        assert len(shares) % among == 0
        assert [i for share in shares for i in share if i >= 0] == list(range(count))
        assert all(share for share in shares), "every process has a part in every step"
        for k in range(0, len(shares), among):
            real = [sum(i >= 0 for i in share) for share in shares[k : k + among]]
            assert max(real) - min(real) <= 1, real


def examples(count: int) -> list[Example]:
    return [Example(np.array([3, 4 + i, 5]), np.array([IGNORED, 4 + i, 5]), "row") for i in range(count)]


def test_what_does_not_count():
    rows = Shared(examples(3))
    collator = Collator("completion", 0)
    share = collated(collator, [rows[0], rows[2]], by_token=True)
    assert (share["labels"] != IGNORED).sum() == 4
    assert "counted" not in share
    nothing = collated(collator, [rows[~1]], by_token=True)
    assert nothing["input_ids"].tolist() == [[3, 5, 5]]
    assert (nothing["labels"] == IGNORED).all()
    assert collated(collator, [rows[0], rows[2]], by_token=False)["counted"] == 4
    assert collated(collator, [rows[~1]], by_token=False)["counted"] == 0


@pytest.mark.parametrize("double_quant", [False, True])
def test_packed_layers_that_fsdp_may_shard(double_quant):
    """The packed bytes become a frozen parameter; outputs, gradients, casts and what is saved stay the same."""
    torch.manual_seed(0)
    layer = loftq.QuantLinear.from_linear(
        torch.nn.Linear(64, 8), loftq.QuantSpec(bits=2, block_size=32, double_quant=double_quant)
    )
    x = torch.randn(5, 64, requires_grad=True)
    expected, saved = layer(x), {n: t.clone() for n, t in layer.state_dict().items()}
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    layer.weight = saved["weight"].clone()  # in memory that numpy has not seen
    layer.make_shardable()
    layer.make_shardable()
    assert {n for n, p in layer.named_parameters() if not p.requires_grad} == {"weight"}
    assert torch.equal(layer(x), expected)
    assert torch.equal(torch.autograd.grad(layer(x).square().sum(), x)[0], gradient)
    storage = layer.weight.untyped_storage()
    storage.resize_(storage.nbytes())  # refused once numpy has seen it
    layer.half()
    assert {n: t.dtype for n, t in layer.state_dict().items() if n != "bias"} == {
        n: t.dtype for n, t in saved.items() if n != "bias"
    }
    assert torch.equal(layer.weight, saved["weight"])


def test_fewer_examples_than_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    processes.check_batch(3)
    with pytest.raises(loftq.ConfigError, match="batch_size is 2, expected at least 3, one example for each process"):
        processes.check_batch(2)


def test_the_first_fsdp_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    with pytest.raises(loftq.ConfigError, match="fsdp_version is 1, expected 2"):
        processes.prepare_spreading()
    monkeypatch.setenv("FSDP_VERSION", "2")
    processes.prepare_spreading()
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    assert os.environ["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"


def test_accumulated_means_are_averaged(bert, letters_a_or_b, tmp_path):
    """The loss of a step of two batches is their mean, for classifiers as well: about log 2 at the start, not twice that."""
    from loftq.data.prepare import DataSettings
    from loftq.finetune.run import train
    from loftq.finetune.settings import TrainSettings

    data = DataSettings("classification", letters_a_or_b)
    settings = TrainSettings(data, max_steps=1, batch_size=6, gradient_accumulation=2)
    record = train(tmp_path / "run", settings, init_from=bert, progress=False)
    assert record.curve[0]["loss"] == pytest.approx(0.69, abs=0.1)
