"""What ends a run before its last step: a metric that gets no better, a loss that runs away or is no number."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from loftq.data.prepare import DataSettings
from loftq.errors import SourceError
from loftq.finetune import watch
from loftq.finetune.run import train
from loftq.finetune.settings import TrainSettings
from loftq.finetune.trainer import TaskTrainer
from loftq.finetune.watch import Divergence
from words import write_rows


def settings(data: str, **changes) -> TrainSettings:
    held = DataSettings("completion", data)
    return TrainSettings(
        **{"data": held, "eval_data": held, "epochs": 6, "batch_size": 12, "learning_rate": 5e-3, **changes}
    )


def test_early_stopping_keeps_the_best(llama, sums, tmp_path):
    """Measured on answers that are letters: the better the model knows that answers are numbers, the worse it does there."""
    wrong = [{"prompt": f"{a}+{b}=", "completion": "zyxwvu"} for a in range(6) for b in range(6)]
    held = DataSettings("completion", write_rows(tmp_path / "wrong.jsonl", wrong))
    record = train(
        tmp_path / "run", settings(sums, eval_data=held, epochs=40, patience=2), init_from=llama, progress=False
    )
    found = [e["perplexity"] for e in record.evaluations]
    print(found)
    best = min(record.evaluations, key=lambda e: e["perplexity"])
    assert record.status == "stopped early"
    assert record.evaluations[-1]["step"] == best["step"] + 2 * 3
    assert record.best_step == best["step"]
    assert record.after["perplexity"] == pytest.approx(best["perplexity"], rel=1e-5)


class Diverges:
    """A loss that becomes NaN at a step."""

    def __init__(self, monkeypatch, step: int) -> None:
        original = TaskTrainer.training_step

        def training_step(trainer, model, inputs, *args, **kwargs):
            loss = original(trainer, model, inputs, *args, **kwargs)
            return loss * float("nan") if trainer.state.global_step >= step else loss

        monkeypatch.setattr(TaskTrainer, "training_step", training_step)


def test_a_run_that_diverges_says_so_and_keeps_its_last_good_checkpoint(llama, sums, tmp_path, monkeypatch):
    Diverges(monkeypatch, 7)
    said: list[str] = []
    record = train(tmp_path / "run", settings(sums), init_from=llama, progress=False, notice=said.append)
    assert record.status == "diverged: the loss is no finite number at step 8"
    assert record.best_step == 6
    assert said[1:] == [
        "the run diverged (the loss is no finite number at step 8); the result is its checkpoint of step 6"
    ]
    assert record.after["perplexity"] == pytest.approx(record.evaluations[-1]["perplexity"], rel=1e-5)
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "run" / "adapter_model.safetensors").values())


def test_diverging_before_any_checkpoint(llama, sums, tmp_path, monkeypatch):
    Diverges(monkeypatch, 1)
    with pytest.raises(
        SourceError, match=r"diverged before its first good checkpoint .* lower the learning rate \(0.005\)"
    ):
        train(tmp_path / "run", settings(sums), init_from=llama, progress=False)


def test_a_loss_that_runs_away():
    guard, control = Divergence(), SimpleNamespace(should_training_stop=False)
    for step, loss in enumerate([5.0] * 30 + [1.0] * 30 + [2.9] * 100):  # 1.9 above: noise, however long
        guard.on_log(None, SimpleNamespace(global_step=step), control, {"loss": loss, "grad_norm": 1.0})
    assert guard.reason is None
    for step in range(160, 200):
        guard.on_log(None, SimpleNamespace(global_step=step), control, {"loss": 8.0, "grad_norm": 1.0})
    assert control.should_training_stop
    assert guard.reason.startswith("the loss has risen from 1 to 3.1 at step 160")


def test_a_checkpoint_whose_weights_give_no_number_is_no_good_one(llama, sums, tmp_path, monkeypatch):
    """Every step has a checkpoint and nothing is measured: the loss of step 8 is that of the weights after step 7."""
    Diverges(monkeypatch, 7)
    record = train(tmp_path / "run", settings(sums, eval_data=None, eval_steps=1), init_from=llama, progress=False)
    assert record.status == "diverged: the loss is no finite number at step 8"
    assert record.best_step == 6


def test_a_run_that_runs_away_keeps_a_checkpoint_from_before(llama, sums, tmp_path, monkeypatch):
    """It is noticed in the average of several steps, whose checkpoints must not take the place of the good ones."""
    monkeypatch.setattr(watch, "WINDOW", 8)
    original = TaskTrainer.training_step

    def training_step(trainer, model, inputs, *args, **kwargs):
        loss = original(trainer, model, inputs, *args, **kwargs)
        return loss + 20 if trainer.state.global_step >= 10 else loss

    monkeypatch.setattr(TaskTrainer, "training_step", training_step)
    chosen = settings(sums, eval_data=None, eval_steps=1, learning_rate=1e-4)
    record = train(tmp_path / "run", chosen, init_from=llama, progress=False)
    losses = [c["loss"] for c in record.curve]
    assert record.status.startswith("diverged: the loss has risen from"), losses
    assert len(losses) > 11, "noticed at once: the test needs a step whose checkpoint is bad"
    assert record.best_step == 9


def test_what_was_logged_before_an_interruption_counts():
    """Half of the steps before it, half after it: the guard is as far as one that has seen them all."""
    losses = [5.0] * 30 + [1.0] * 30 + [8.0] * 6
    guards = Divergence(), Divergence()
    for step, loss in enumerate(losses, 1):
        guards[0].on_log(None, SimpleNamespace(global_step=step), SimpleNamespace(), {"loss": loss})
    history = [{"loss": loss, "step": step} for step, loss in enumerate(losses, 1)]
    guards[1].on_train_begin(None, SimpleNamespace(log_history=[*history, {"eval_loss": 1.0}]), SimpleNamespace())
    assert vars(guards[0]) == vars(guards[1])
    assert guards[1].good_until == 59
    assert guards[1].is_high


@pytest.mark.parametrize(("is_measured", "saves"), [(False, [True, False, True]), (True, [True, True, True])])
def test_no_checkpoint_while_the_loss_is_high(is_measured, saves):
    """Where measurements decide, the best is kept in any case, and must not be missed for a loss that is noise."""
    guard, found = Divergence(is_measured), []
    for step, loss in enumerate([1.0] * 30 + [3.5, 1.0], 1):
        control = SimpleNamespace(should_save=True)
        guard.on_log(None, SimpleNamespace(global_step=step), control, {"loss": loss})
        found.append(control.should_save)
    assert found[-3:] == saves
    assert guard.reason is None
