"""Two runs in one folder, checkpoints that are damaged or have moved, and reporters that fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from loftq.cli import main
from loftq.data.prepare import DataSettings
from loftq.errors import ConfigError, OutputError
from loftq.finetune import reporters
from loftq.finetune.record import TrainingRecord
from loftq.finetune.reporters import Reporter, reporter
from loftq.finetune.run import train
from loftq.finetune.settings import TrainSettings
from loftq.finetune.trainer import TaskTrainer
from words import write_rows


def settings(data: str, **changes) -> TrainSettings:
    held = DataSettings("completion", data, limit=6)
    return TrainSettings(
        **{"data": held, "eval_data": held, "epochs": 4, "batch_size": 3, "learning_rate": 5e-3, **changes}
    )


COMMAND = "import sys; from loftq.cli import main; main()"


def test_two_runs_in_one_folder(llama, sums, tmp_path, monkeypatch, capsys):
    """The second is refused in one sentence, the first goes on to its end."""
    run = tmp_path / "run"
    options = ["--init-from", llama, "--task", "completion", "--data", sums, "--eval-data", sums]
    command = ["train", run, *options, "--epochs", 10, "--eval-steps", 1, "--json"]
    words = [str(word) for word in command]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    first = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (run / "started.json").exists() and first.poll() is None:
        time.sleep(0.02)
    monkeypatch.setattr(sys, "argv", ["loftq", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert first.poll() is None, "the first was over before the second began"
    refused = capsys.readouterr()
    assert (stop.value.code, refused.out) == (2, "")
    assert refused.err == f"loftq: another process is writing {run}; wait for it or choose another folder\n"
    printed, said = first.communicate()
    assert (first.returncode, json.loads(printed)["status"]) == (0, "finished"), said
    assert TrainingRecord.load(run).after == json.loads(printed)["after"]


@contextmanager
def interruption(after: int) -> Iterator[None]:
    """The run within is interrupted once its checkpoint of a step is written."""
    original = TaskTrainer._save_checkpoint

    def save(trainer, *arguments):
        original(trainer, *arguments)
        if trainer.state.global_step == after:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TaskTrainer, "_save_checkpoint", save)
        try:
            yield
        except KeyboardInterrupt:
            return
    pytest.fail(f"there was no checkpoint of step {after}")


@pytest.fixture(scope="module")
def interrupted(llama, sums, tmp_path_factory) -> tuple[Path, TrainingRecord]:
    """A folder whose run was stopped after its second checkpoint of four, and the record of the same run uninterrupted."""
    folder = tmp_path_factory.mktemp("interrupted")
    whole = train(folder / "whole", settings(sums), init_from=llama, progress=False)
    with interruption(after=4):
        train(folder / "run", settings(sums), init_from=llama, progress=False)
    assert {p.name for p in (folder / "run" / "checkpoints").iterdir()} == {"checkpoint-2", "checkpoint-4"}
    return folder / "run", whole


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    """One byte in the middle is another."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


DAMAGES = {
    "weights cut": ("adapter_model.safetensors", halved, "adapter_model.safetensors: "),
    "weights empty": ("adapter_model.safetensors", lambda p: p.write_bytes(b""), "adapter_model.safetensors: "),
    "weights gone": ("adapter_model.safetensors", Path.unlink, "it has no weights"),
    "optimizer cut": ("optimizer.pt", halved, "optimizer.pt: "),
    "optimizer changed": ("optimizer.pt", flipped, "optimizer.pt: "),
    "optimizer gone": ("optimizer.pt", Path.unlink, "optimizer.pt is missing"),
    "random state cut": ("rng_state.pth", halved, "rng_state.pth: "),
    "state cut": ("trainer_state.json", halved, "trainer_state.json: "),
    "state of another kind": ("trainer_state.json", lambda p: p.write_text("[]"), "trainer_state.json: "),
}


def check_same_end(record: TrainingRecord, whole: TrainingRecord, run: Path) -> None:
    assert (record.status, record.best_step) == (whole.status, whole.best_step)
    assert record.after["loss"] == pytest.approx(whole.after["loss"], abs=1e-5)
    assert [c["step"] for c in record.curve] == [c["step"] for c in whole.curve]
    assert all(torch.isfinite(t).all() for t in load_file(run / "adapter_model.safetensors").values())


@pytest.mark.parametrize(("name", "spoil", "words"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    interrupted, llama, sums, tmp_path, name, spoil, words
):
    folder, whole = interrupted
    run = Path(shutil.copytree(folder, tmp_path / "run"))
    last = run / "checkpoints" / "checkpoint-4"
    spoil(last / name)
    said: list[str] = []
    record = train(run, settings(sums), init_from=llama, progress=False, notice=said.append)
    assert len(said) == 2
    assert "is both trained and measured on" in said[0]
    assert said[1].startswith(f"{last} is damaged ({words}"), said
    assert said[1].endswith("); it is removed and an earlier checkpoint is tried")
    check_same_end(record, whole, run)


def test_a_run_says_from_where_it_continues_and_what_it_measures(interrupted, llama, sums, tmp_path, capsys):
    folder, _ = interrupted
    run = Path(shutil.copytree(folder, tmp_path / "run"))
    train(run, settings(sums), init_from=llama)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("loftq: ")]
    assert lines[:2] == ["loftq: continuing from step 4 of 8", "loftq: training (loftq): 4 of 8 steps"]
    assert lines[2].startswith("loftq: step 6 of 8: perplexity ")
    assert " ± " in lines[2]
    assert lines[3].startswith("loftq: step 8 of 8: perplexity ")
    assert lines[4].startswith("loftq: training (loftq): 8 of 8 steps in ")
    assert len(lines) == 5


def test_without_any_whole_checkpoint_the_run_begins_anew(interrupted, llama, sums, tmp_path):
    folder, whole = interrupted
    run = Path(shutil.copytree(folder, tmp_path / "run"))
    for step in (2, 4):
        halved(run / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt")
    halved(run / "before.json")
    said: list[str] = []
    record = train(run, settings(sums), init_from=llama, progress=False, notice=said.append)
    endings = [sentence.rpartition("removed and ")[2] for sentence in said[1:]]
    assert endings == ["an earlier checkpoint is tried", "the run begins anew"]
    assert record.before == whole.before
    check_same_end(record, whole, run)


def test_a_run_that_has_moved_keeps_its_best_checkpoint(interrupted, llama, sums, tmp_path, monkeypatch):
    """Its path is written into a checkpoint; without it the result would be the last step, not the best."""
    folder, _ = interrupted
    run = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    state = run / "checkpoints" / "checkpoint-4" / "trainer_state.json"
    known = json.loads(state.read_text())
    # as if nothing that comes later could be better
    state.write_text(
        json.dumps({**known, "best_metric": 0.5, "best_global_step": 2, "best_model_checkpoint": "gone/checkpoint-2"})
    )
    monkeypatch.chdir(tmp_path)
    record = train("elsewhere", settings(sums), init_from=llama, progress=False)
    assert record.best_step == 2
    assert record.after["perplexity"] == pytest.approx(record.evaluations[0]["perplexity"], rel=1e-5)


@pytest.mark.parametrize("waited", [1, 2])
def test_patience_is_not_renewed_by_an_interruption(llama, sums, tmp_path, waited):
    """After the first measurement without improvement; and after the second, with which the run is over."""
    wrong = [{"prompt": f"{a}+{b}=", "completion": "zyxwvu"} for a in range(6) for b in range(6)]
    held = DataSettings("completion", write_rows(tmp_path / "wrong.jsonl", wrong), limit=6)
    chosen = settings(sums, eval_data=held, epochs=20, patience=2)
    whole = train(tmp_path / "whole", chosen, init_from=llama, progress=False)
    assert whole.status == "stopped early", whole.evaluations
    with interruption(after=whole.best_step + waited * 2):
        train(tmp_path / "run", chosen, init_from=llama, progress=False)
    record = train(tmp_path / "run", chosen, init_from=llama, progress=False)
    assert [e["step"] for e in record.evaluations] == [e["step"] for e in whole.evaluations]
    check_same_end(record, whole, tmp_path / "run")


def test_nothing_is_trained_after_the_last_step(llama, sums, tmp_path):
    """Interrupted while the result is written: five steps of two an epoch remain five."""
    chosen = settings(sums, eval_data=None, max_steps=5, schedule="constant")
    whole = train(tmp_path / "whole", chosen, init_from=llama, progress=False)
    with interruption(after=5):
        train(tmp_path / "run", chosen, init_from=llama, progress=False)
    record = train(tmp_path / "run", chosen, init_from=llama, progress=False)
    assert (record.status, record.best_step, len(record.curve)) == ("finished", 5, 5)
    found, wanted = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("run", "whole"))
    assert whole.best_step == 5
    assert all(torch.allclose(found[n], wanted[n], atol=1e-6) for n in wanted)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_reporter_that_is_not_installed(llama, sums, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"report_to is {name}, which is not installed; pip install {name}$"):
        train(tmp_path / "run", settings(sums, report_to=name), init_from=llama, progress=False)
    assert not (tmp_path / "run").exists()


class Offline(TrainerCallback):
    """A reporter whose network goes down at a step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.seen: list[int] = []

    def on_log(self, args, state, control, **kwargs):
        self.seen.append(state.global_step)
        if state.global_step >= self.step:
            raise ConnectionError("no route to host")


def test_a_reporter_that_fails_does_not_end_the_run(llama, sums, tmp_path, monkeypatch):
    """``ConnectionError`` is an ``OSError``, as a full disk is: it must not be taken for one."""
    inner, said = Offline(3), []
    monkeypatch.setattr("loftq.finetune.training.reporter", lambda name, run, notice: Reporter(name, inner, notice))
    monkeypatch.setattr("loftq.finetune.training.check_reporter", lambda name: None)
    chosen = settings(sums, report_to="wandb")
    record = train(tmp_path / "run", chosen, init_from=llama, progress=False, notice=said.append)
    assert (record.status, len(record.curve)) == ("finished", 8)
    assert said[1:] == [
        "wandb failed (no route to host); the run goes on without it, its curve is in training.json",
    ]
    assert max(inner.seen) == 3


def test_an_error_of_the_operating_system_in_training_is_no_full_disk(llama, sums, tmp_path, monkeypatch):
    def training_step(*arguments, **options):
        raise OSError("a device that is not there")

    monkeypatch.setattr(TaskTrainer, "training_step", training_step)
    with pytest.raises(OSError, match="a device that is not there") as raised:
        train(tmp_path / "run", settings(sums), init_from=llama, progress=False)
    assert not isinstance(raised.value, OutputError)


def test_checkpoints_that_cannot_be_written_are_one_sentence(llama, sums, tmp_path, monkeypatch):
    from transformers import Trainer

    def save(*arguments, **options):
        raise PermissionError(13, "Permission denied", "checkpoint-2")

    monkeypatch.setattr(Trainer, "save_model", save)
    with pytest.raises(OutputError, match=r"cannot write to .*run: Permission denied \(checkpoint-2\)"):
        train(tmp_path / "run", settings(sums), init_from=llama, progress=False)


def test_the_curve_for_tensorboard(llama, sums, tmp_path):
    pytest.importorskip("tensorboard")
    train(tmp_path / "run", settings(sums, epochs=1, report_to="tensorboard"), init_from=llama, progress=False)
    assert [p.name[:6] for p in (tmp_path / "run" / "logs").iterdir()] == ["events"]


def test_a_reporter_that_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setattr(reporters, "check_reporter", lambda name: None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"report_to is wandb, which does not start \(.*\); choose none"):
        reporter("wandb", tmp_path, lambda sentence: None)
