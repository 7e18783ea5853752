"""``loftq ablate`` with fine-tuning: every cell as ``loftq train`` would train it, and continued after an interrupt."""

import statistics
from dataclasses import replace

import pytest

import loftq
from loftq.ablate import Ablation, Sweep, ablate, run
from loftq.data.prepare import DataSettings
from loftq.errors import ConfigError, OutputError
from loftq.finetune.record import TrainingRecord
from loftq.finetune.settings import TrainSettings
from sweeps import invoke, table

pytestmark = pytest.mark.usefixtures("one_thread")


def settings(bert, data, steps):
    rows = DataSettings("classification", data)
    train = TrainSettings(rows, rows, max_steps=steps, batch_size=24, learning_rate=1e-2, metrics=("accuracy",))
    return Ablation(str(bert.parent / "source"), Sweep(bits=(2,), rank=(4,)), train=train)


@pytest.mark.slow
def test_trains_every_cell(bert, letters_a_or_b, tmp_path):
    out = tmp_path / "out"
    arguments = [
        bert.parent / "source",
        "--out",
        out,
        "--iters",
        "0,1",
        "--bits",
        "2",
        "--rank",
        "2,4",
        "--base",
        "rank=4",
    ]
    arguments += ["--task", "classification", "--data", letters_a_or_b, "--eval-data", letters_a_or_b]
    arguments += ["--max-steps", "6", "--lr", "1e-2", "--batch-size", "24"]
    done = invoke(*arguments)
    rows = table(out / "ablation.csv")
    assert sorted((r["method"], r["rank"], r["iters"]) for r in rows) == [
        ("loftq", "2", "1"),
        ("loftq", "4", "1"),
        ("qlora", "2", "0"),
        ("qlora", "4", "0"),
    ]  # the rank of QLoRA counts, for it is trained
    assert {r["status"] for r in rows} == {"finished"}
    assert {r["error"] for r in rows} == {""}
    assert all(0 <= float(r["before_accuracy"]) <= 100 for r in rows)
    assert len({r["after_accuracy"] for r in rows} | {r["before_accuracy"] for r in rows}) > 1, "nothing was learned"
    assert "accuracy after" in done.stdout
    assert not (out / "cells").exists()
    with pytest.raises(OutputError, match="another train max_steps"):
        invoke(*arguments, "--max-steps", "7")


def test_cells_train_as_they_would_alone(bert, letters_a_or_b, tmp_path):
    chosen = settings(bert, letters_a_or_b, 4)
    ((row, _),) = ablate(chosen, tmp_path / "out", progress=False)
    config = loftq.LoftQConfig(bits=2, rank=4, method="loftq", calibration=None)
    loftq.quantize_checkpoint(bert.parent / "source", tmp_path / "q", config, progress=False)
    record = run.train(tmp_path / "run", chosen.train, init_from=tmp_path / "q", progress=False)
    assert row.metrics == {f"before_{k}": v for k, v in record.before.items()} | {
        f"after_{k}": v for k, v in record.after.items()
    }


def test_several_seeds(bert, letters_a_or_b, tmp_path):
    """Each cell is quantized once, trained with every seed, and has their mean and sample standard deviation."""
    chosen = replace(settings(bert, letters_a_or_b, 4), seeds=(0, 1, 2), keep=True)
    ((row, _),) = ablate(chosen, tmp_path / "out", progress=False)
    (folder,) = (p for p in (tmp_path / "out" / "cells").iterdir() if p.name.endswith("-runs"))
    records = [TrainingRecord.load(folder / seed) for seed in "012"]
    assert [record.train_settings.seed for record in records] == [0, 1, 2]
    for when in ("before", "after"):
        values = [getattr(record, when)["accuracy"] for record in records]
        assert row.metrics[f"{when}_accuracy"] == pytest.approx(statistics.fmean(values))
        assert row.metrics[f"{when}_accuracy_sd"] == pytest.approx(statistics.stdev(values))
    assert (row, False) in list(ablate(chosen, tmp_path / "out", progress=False)), "read back from the table"
    options = ["--task", "classification", "--data", letters_a_or_b, "--eval-data", letters_a_or_b, "--bits", "2"]
    options += ["--rank", "4", "--max-steps", "4", "--lr", "1e-2", "--batch-size", "24", "--metrics", "accuracy"]
    done = invoke(bert.parent / "source", "--out", tmp_path / "cli", *options, "--seeds", "0,1,2")
    (read,) = table(tmp_path / "cli" / "ablation.csv")
    assert {n: float(v) for n, v in read.items() if "_accuracy" in n} == pytest.approx(
        {n: v for n, v in row.metrics.items() if "_accuracy" in n}
    )
    assert " ± " in done.stdout
    for seeds, expected in (
        ("0,0", "seeds is 0, 0, expected different ones"),
        ("a", "--seeds is 'a', expected integers"),
        ("0,-1", "seed is -1"),
    ):
        with pytest.raises(ConfigError, match=expected):
            invoke(bert.parent / "source", "--out", tmp_path / "bad", *options, "--seeds", seeds)


def test_an_interrupted_training_continues(bert, letters_a_or_b, tmp_path, monkeypatch):
    chosen = settings(bert, letters_a_or_b, 2)
    train, started = run.train, []

    def interrupted(folder, *args, **kwargs):
        started.append(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(ablate(chosen, tmp_path / "out", progress=False))
    quantized = tmp_path / "out" / "cells" / started[0].parent.name.removesuffix("-runs")
    before = (quantized / "model.safetensors").stat().st_mtime_ns
    seen = []

    def continued(folder, *args, **kwargs):
        seen.append((folder, (kwargs["init_from"] / "model.safetensors").stat().st_mtime_ns))
        return train(folder, *args, **kwargs)

    monkeypatch.setattr(run, "train", continued)
    ((row, fresh),) = ablate(chosen, tmp_path / "out", progress=False)
    assert fresh
    assert seen == [(started[0], before)], "the same run of the same quantized folder"
    assert row.status == "finished"
    assert not (tmp_path / "out" / "cells").exists()
