"""benchmarks/finetune/run.py: the command line takes every command of every experiment, and time that is up ends a run."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from loftq.cli import app

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks" / "finetune"), str(ROOT / "benchmarks"), *sys.path])
    for name in ("run", "experiments", "common"):  # such names are not this folder's alone
        monkeypatch.delitem(sys.modules, name, raising=False)
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
