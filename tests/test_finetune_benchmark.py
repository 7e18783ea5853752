"""benchmarks/finetune: the command line takes every command, time that is up ends a run, pictures of one seed or several."""

from __future__ import annotations

import json
import math
import shlex
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from loftq.cli import app

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(monkeypatch):
    """The modules of the benchmark can be imported."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks" / "finetune"), str(ROOT / "benchmarks"), *sys.path])
    for name in ("run", "experiments", "common", "pictures"):  # such names are not this folder's alone
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def run(folder):
    import run

    if not run.DATA.is_dir():
        pytest.skip("the data of the benchmarks are not here")
    return run


def parsed(words):
    """What the command line makes of a command, without running it."""
    name, *rest = map(str, words)
    return get_command(app).commands[name].make_context(name, rest)


@pytest.mark.slow
def test_the_command_line_takes_every_command(run, tmp_path):
    for make in run.experiments.EXPERIMENTS.values():
        experiment = make()
        assert len({one.name for one in experiment.runs}) == len(experiment.runs)
        shared = experiment.options(tmp_path)
        for one in experiment.runs:
            context = parsed(shlex.split(run.command(tmp_path, experiment, one, shared))[1:])
            assert context.params["seed"] == one.seed
        left = {one.start for one in experiment.runs}
        while left:
            for command in experiment.model.commands(left.pop(), tmp_path):
                if isinstance(command, str):
                    left.add(command)
                else:
                    parsed((*command, "--device", "cpu") if command[0] == "quantize" else command)


def test_first_seeds_come_first_and_none_begins_when_the_time_is_up(run, tmp_path, monkeypatch, capsys):
    begun = []

    def train(experiment, folder, one, *rest):
        begun.append(one.name)
        return 1.0

    monkeypatch.setattr(run, "WORK", tmp_path)
    monkeypatch.setattr(run, "recorded", lambda experiment: {})
    monkeypatch.setattr(run, "train", train)
    monkeypatch.setattr(run, "row", lambda experiment, folder, one: {"command": one.name})
    monkeypatch.setattr(run, "save", lambda *args: None)
    experiment = run.experiments.stories()
    run.perform(experiment, experiment.runs, 1, "cpu", -math.inf)
    assert begun == []
    assert capsys.readouterr().out.count("not begun, the time is up") == len(experiment.runs)
    run.perform(experiment, experiment.runs, 1, "cpu", math.inf)
    seeds = [one.seed for name in begun for one in experiment.runs if one.name == name]
    assert seeds == sorted(seeds)
    assert len(seeds) == len(experiment.runs)


@pytest.mark.parametrize("seeds", [1, 2])
def test_pictures(folder, tmp_path, monkeypatch, seeds):
    pytest.importorskip("matplotlib")
    import pictures

    def row(method, bits, before, after, seed, steps=30):
        ends = {"before": {"perplexity": before}, "after": {"perplexity": after}}
        curve = [3 + 1 / (step + 1) for step in range(steps)]
        return {
            "method": method,
            "bits": bits,
            "seed": seed,
            "learning_rate": 1e-3 * (seed + 1),
            "curve": curve,
            **ends,
        }

    rows = [row("lora", 16, 30.0, 15.0, seed) for seed in range(seeds)]
    rows += [row("qlora", 2, 4e9, 1e3, seed, steps=20 + seed) for seed in range(seeds)]
    rows += [row("loftq-data", bits, 60.0, 20.0, 0) for bits in (2, 4)]
    for name in ("wikitext2_gpu", "rates"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"title": "Title", "rows": rows}))
    monkeypatch.setattr(pictures, "HERE", tmp_path)
    monkeypatch.setattr(pictures, "PLOTS", tmp_path / "plots")
    drawn = [path for name in ("wikitext2_gpu", "rates", "absent") for path in pictures.plot(name, "perplexity")]
    assert [path.name for path in drawn] == ["wikitext2_gpu-ends.png", "wikitext2_gpu-curves.png", "rates.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    lora = {row["seed"]: row["curve"] for row in rows if row["method"] == "lora"}
    lora = {seed: pictures.np.array(curve) for seed, curve in lora.items()}
    runs = [row for row in rows if row["method"] == "qlora"]
    above = pictures.against(runs, lora)
    assert above.shape == (seeds, 20), "while all of them ran"
    assert abs(above).max() == 0, "the same losses on the same batches"
