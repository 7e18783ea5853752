"""Errors that are measured once, kept and used again; and `loftq plan` on a real model."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import typer
from synthetic import synthetic
from typer.testing import CliRunner

from loftq import LoftQConfig, QuantSpec
from loftq.calibrate.choose import Inputs
from loftq.checkpoint.naming import meta_model
from loftq.checkpoint.source import open_source
from loftq.cli.plan import plan as plan_verb
from loftq.errors import ConfigError, LoftQError, SourceError
from loftq.plan import measure
from loftq.plan.budget import (
    best_weighting,
    module_cost,
)
from loftq.plan.errors import ErrorTable, grid, measure_checkpoint, measure_errors
from loftq.plan.file import Choice, apply_plan, load_plan
from loftq.plan.measure import ModuleErrors
from loftq.plan.targets import plan_modules
from loftq.solver import decompose
from loftq.solver.importance import InputStatistics
from loftq.solver.methods import METHODS
from loftq.units import decompose_module

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_absolute_cost_is_the_output_error():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(48, 64, generator=generator)
    inputs = torch.randn(500, 64, generator=generator) * torch.linspace(0.1, 3, 64)
    statistics = InputStatistics(inputs.T @ inputs / 500, tokens=500)
    config = LoftQConfig(method="cloq", damping=0.0, num_iter=1)
    norm, power = measure._unit(weight, "linear", config, statistics)
    result = decompose(weight, QuantSpec(bits=2), rank=4, num_iter=1, method="cloq", importance=statistics, damping=0.0)
    entry = ModuleErrors("linear", (48, 64), 0, norm, power, {Choice(2, 64, 4): result.objective})
    table = ErrorTable({"m": entry}, {"method": "cloq", "calibration": {"name": "text"}})
    expected = float((inputs.double() @ (weight - result.dequantize()).double().T).square().sum()) / 500
    # the statistics are float32 and have a floor of 1e-6 of their mean
    assert module_cost(table, "m", Choice(2, 64, 4), "absolute") == pytest.approx(expected, rel=1e-3)
    assert module_cost(table, "m", Choice(2, 64, 4), "relative") == result.objective**2


def test_gradients_decide_the_weighting():
    table = synthetic(1)
    assert best_weighting(table) == "relative"
    for method, gradients, expected in (
        ("loftq-data", True, "absolute"),
        ("loftq-data", False, "relative"),
        ("cloq", True, "relative"),  # makes no use of gradients in the outputs
    ):
        chosen = {**table.settings, "method": method, "calibration": {"gradients": gradients}}
        assert best_weighting(dataclasses.replace(table, settings=chosen)) == expected


CHOICES = grid((2, 4), (64,), (2, 4))
CONFIG = LoftQConfig(method="loftq", num_iter=1, svd="exact", target_modules=("q_proj", "down_proj"))


@pytest.fixture
def source(stories_dir):
    return open_source(stories_dir)


@pytest.fixture
def counted(monkeypatch):
    """Names of the modules that are decomposed, one entry a time."""
    names: list[str] = []

    def counting(weight, plan, config, statistics=None):
        names.append(plan.name)
        return decompose_module(weight, plan, config, statistics)

    monkeypatch.setattr(measure, "decompose_module", counting)
    return names


def test_entries_are_the_solvers_objectives(source):
    """At every rank, also where one decomposition serves several ranks."""
    table = measure_errors(source, CONFIG, CHOICES, progress=False)
    plans = plan_modules(meta_model(source.config()), CONFIG)
    assert list(table.modules) == list(plans)
    for name in list(plans)[:3]:
        weight = source.read(f"{name}.weight")
        assert table.modules[name].shape == tuple(weight.shape)
        assert table.modules[name].layer == int(name.split(".")[2])
        assert table.modules[name].norm == pytest.approx(float(weight.double().norm()))
        for choice, objective in table.modules[name].objectives.items():
            plan = dataclasses.replace(plans[name], spec=plans[name].spec.replace(bits=choice.bits), rank=choice.rank)
            # float32 singular values
            assert objective == pytest.approx(decompose_module(weight, plan, CONFIG).objective, rel=1e-4), choice


def test_a_table_is_kept_and_used_again(source, tmp_path, counted):
    path = tmp_path / "errors.json"
    table = measure_errors(source, CONFIG, CHOICES, path=path, progress=False)
    assert ErrorTable.load(path) == table
    first = len(counted)
    assert measure_errors(source, CONFIG, CHOICES, path=path, progress=False) == table
    assert len(counted) == first
    more = measure_errors(source, CONFIG, grid((2, 3, 4), (64,), (2, 4)), path=path, progress=False)
    assert len(counted) == first * 3 // 2, "only what the table lacks is measured"
    assert {n: {c: e.objectives[c] for c in CHOICES} for n, e in more.modules.items()} == {
        n: e.objectives for n, e in table.modules.items()
    }
    assert [p.name for p in tmp_path.iterdir()] == ["errors.json"]


def test_an_interrupted_measurement_continues(source, tmp_path, monkeypatch):
    whole = measure_errors(source, CONFIG, CHOICES, progress=False)
    path = tmp_path / "errors.json"
    done: list[str] = []

    def stopping(weight, plan, config, statistics=None):
        if plan.name == "model.layers.3.self_attn.q_proj":
            raise KeyboardInterrupt
        return decompose_module(weight, plan, config, statistics)

    monkeypatch.setattr(measure, "decompose_module", stopping)
    with pytest.raises(KeyboardInterrupt):
        measure_errors(source, CONFIG, CHOICES, path=path, progress=False)
    kept = ErrorTable.load(path).modules
    assert 0 < len(kept) < len(whole.modules)

    def counting(weight, plan, config, statistics=None):
        done.append(plan.name)
        return decompose_module(weight, plan, config, statistics)

    monkeypatch.setattr(measure, "decompose_module", counting)
    assert measure_errors(source, CONFIG, CHOICES, path=path, progress=False) == whole
    assert set(done) == set(whole.modules) - set(kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_iter": 2}, "measured with num_iter 1"),
        ({"codebook": "nf"}, "measured with codebook 'lloyd'"),
        ({"method": "qpissa"}, "measured with method 'loftq'"),
    ],
)
def test_a_table_of_other_settings_is_refused(source, tmp_path, change, message):
    path = tmp_path / "errors.json"
    one = CONFIG.replace(target_modules=r".*layers\.0.*q_proj")
    measure_errors(source, one, CHOICES[:1], path=path, progress=False)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=message):
        measure_errors(source, one.replace(**change), CHOICES[:1], path=path, progress=False)
    with pytest.raises(ConfigError, match="measured with another model"):
        measure_errors(source, one, CHOICES[:1], path=path, hashes={"model.safetensors": "0"}, progress=False)
    assert path.read_bytes() == before


def test_a_damaged_table_is_refused(source, tmp_path):
    path = tmp_path / "errors.json"
    table = synthetic(1)
    table.save(path)
    values = json.loads(path.read_text())
    for damage in ([2, 64], [2, 64, 8, -1.0], [5, 64, 8, 0.1]):
        values["modules"]["layers.0.m0"]["objectives"] = [damage]
        path.write_text(json.dumps(values))
        with pytest.raises(SourceError, match="damaged"):
            ErrorTable.load(path)


def test_calibration_reaches_the_table(source, stories_dir):
    """A module without statistics counts by its weight error, the others by their own objective."""
    names = list(plan_modules(meta_model(source.config()), CONFIG))
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in names[1:]:
        x = torch.randn(400, source.tensors[f"{name}.weight"].shape[1], generator=generator)
        x[:, 0] *= 5
        found[name] = InputStatistics(x.T @ x / 400, tokens=400)
    inputs = Inputs("loftq-data", tuple(found), {"name": "noise", "gradients": False}, statistics=found)
    table = measure_errors(source, CONFIG.replace(method=None), CHOICES[:1], inputs=inputs, progress=False)
    assert list(table.modules) == names
    assert table.settings["method"] == "loftq-data"
    assert table.settings["calibration"] == {"name": "noise", "gradients": False}
    first = table.modules[names[0]]
    assert first.power is None
    assert first.norm == pytest.approx(float(source.read(f"{names[0]}.weight").double().norm()))
    for name in names[1:]:
        entry = table.modules[name]
        assert entry.power == pytest.approx(float(found[name].diagonal.double().mean()))
        weight = source.read(f"{name}.weight").double()
        moment = found[name].second_moment.double()
        exact = float(torch.trace(weight @ moment @ weight.T)) / entry.power
        damping = METHODS["loftq-data"].damping
        blend = (1 - damping) * exact + damping * float(weight.square().sum())
        assert entry.norm**2 == pytest.approx(blend, rel=1e-3)


# --- the command


@pytest.fixture
def command(stories_dir, tmp_path):
    app = typer.Typer()
    app.command()(plan_verb)

    def run(*options: str):
        arguments = [str(stories_dir), "--out", str(tmp_path / "plan.json"), "--no-calibration", *options]
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
        return result, tmp_path / "plan.json"

    return run


def test_a_real_model_from_the_command_line(command, source, stories_dir):
    result, path = command("--target-bpw", "3", "--rank", "4", "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    plan = load_plan(path)
    printed = json.loads(result.stdout)["plans"]
    assert printed["plan"]["objective"] <= printed["3 bits"]["objective"] or printed["plan"]["bits_per_weight"] <= 3
    config = LoftQConfig(method="loftq", num_iter=1)
    plans = apply_plan(plan_modules(meta_model(source.config()), config), plan)
    nbytes, objective = 0, 0.0
    for name, module in plans.items():
        done = decompose_module(source.read(f"{name}.weight"), module, config)
        nbytes += done.quantized.nbytes
        objective += done.objective**2
    assert nbytes == printed["plan"]["weight_bytes"]
    assert 8 * nbytes / 226560 <= 3
    assert objective == pytest.approx(printed["plan"]["objective"], rel=1e-5)
    # the same table serves the rule, whose plan costs more
    again, path = command("--target-bpw", "3", "--rank", "4", "--rule", "first-layers")
    assert again.exit_code == 0, (again.output, again.exception)
    rule = load_plan(path)
    assert rule.rule == "first-layers"
    assert {c.bits for n, c in rule.modules.items() if ".layers.0." in n} == {4}
    assert {c.bits for n, c in rule.modules.items() if ".layers.0." not in n} == {2}
    assert "first 1 layers 4 bits, rest 2" in again.stdout
    assert rule.predicted["first 1 layers 4 bits, rest 2"]["objective"] > printed["plan"]["objective"]


def test_the_printed_tables(command):
    result, path = command("--target-bits", "2.5", "--ranks", "2,4", "--rank-budget", "3")
    assert result.exit_code == 0, (result.output, result.exception)
    for text in ("self_attn.q_proj", "bits by layer: 0: ", "code bits", "plan of 35 modules"):
        assert text in result.stdout, text
    plan = load_plan(path)
    assert plan.target == {"code_bits": 2.5, "average_rank": 3.0}
    assert {c.rank for c in plan.modules.values()} == {2, 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "neither of --target-bpw"),
        (["--target-bpw", "3", "--target-bits", "3"], "both of --target-bpw"),
        (["--target-bpw", "3", "--rank", "4", "--ranks", "4,8"], "--rank and --ranks"),
        (["--target-bpw", "3", "--rule", "last-layers"], "did you mean first-layers"),
        (["--target-bpw", "3", "--weighting", "abs"], "--weighting is 'abs'"),
        (["--target-bpw", "3", "--bits", "2,x"], "--bits is '2,x'"),
        (["--target-bpw", "3", "--bits", "2,5"], "bits is 5"),
        (["--target-bpw", "3", "--layer-bits", "4"], "expected HIGH:LOW"),
        (["--target-bpw", "3", "--rank-budget", "much"], "--rank-budget is 'much'"),
        (["--target-bpw", "3", "--statistics", "x"], "--no-calibration was given together"),
        (["--target-bpw", "3", "--published", "--codebook", "nf"], "--published already sets"),
    ],
)
def test_mistakes_are_one_sentence(command, options, message):
    result, path = command(*options)
    assert isinstance(result.exception, LoftQError), result.output
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not path.exists()


def test_measuring_a_checkpoint_without_calibration(stories_dir):
    config = CONFIG.replace(calibration=None, target_modules=r".*layers\.0.*q_proj")
    table = measure_checkpoint(stories_dir, config, CHOICES[:1], progress=False)
    assert table.settings["calibration"] is None
    assert set(table.settings["sha256"]) == {"model.safetensors"}
