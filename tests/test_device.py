"""``loftq quantize --device``: matrices are decomposed elsewhere, and everything else is as before."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import loftq
from loftq import units
from loftq.checkpoint.assembly import Parameters
from loftq.checkpoint.naming import meta_model
from loftq.checkpoint.source import open_source
from loftq.engine.jobs import Job, LocalEngine
from loftq.plan.targets import plan_modules
from loftq.solver.importance import InputStatistics
from tiny import tiny_model

CONFIG = loftq.LoftQConfig(bits=3, rank=4, num_iter=2, calibration=None)
GPU = torch.cuda.is_available()


def saved(name: str, folder: Path) -> Path:
    tiny_model(name).save_pretrained(folder / "source")
    return folder / "source"


@pytest.mark.parametrize(
    ("device", "message"),
    [
        pytest.param("cuda", "device is 'cuda', expected cpu, or a GPU", marks=pytest.mark.skipif(GPU, reason="it is")),
        ("cuda:99", "device is 'cuda:99', expected cpu, or a GPU"),
        ("gpu", "device is 'gpu', expected cpu, or a GPU"),
        ("meta", "device is 'meta', expected cpu, or a GPU"),
    ],
)
def test_a_device_that_is_not_there(tmp_path, device, message):
    source = saved("llama", tmp_path)
    with pytest.raises(loftq.ConfigError, match=message):
        loftq.quantize_checkpoint(source, tmp_path / "out", CONFIG, progress=False, device=device)
    assert not (tmp_path / "out").exists()


def test_ray_has_no_device(tmp_path):
    with pytest.raises(loftq.ConfigError, match="device is 'cuda', but Ray's workers compute on their processors"):
        loftq.quantize_checkpoint("m", tmp_path / "out", CONFIG, progress=False, engine="ray", device="cuda")


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_one_after_the_other_is_the_same(tmp_path, monkeypatch, name):
    """What a GPU is given is what the CPU is given, in the order of the jobs; here it computes on the CPU after all."""
    source = open_source(saved(name, tmp_path))
    model = meta_model(source.config())
    parameters = Parameters(source, model)
    todo = [u for u in units.make_units(source, model, plan_modules(model, CONFIG), parameters) if u.plan is not None]
    expected = {
        unit.name: computed[0][0]
        for unit, computed in LocalEngine(source, parameters, CONFIG, torch.device("cpu")).run(map(Job, todo))
    }
    gpu, asked, decompose = SimpleNamespace(type="cuda"), [], units.decompose_matrices

    def on_cpu(matrices, plan, config, statistics, device):
        asked.append(device)
        return decompose(matrices, plan, config, statistics)

    monkeypatch.setattr(units, "decompose_matrices", on_cpu)
    found = list(LocalEngine(source, parameters, CONFIG, gpu).run(map(Job, todo)))
    assert [unit.name for unit, _ in found] == [unit.name for unit in todo]
    assert asked == [gpu] * len(todo)
    for unit, ((tensors, _), _) in found:
        assert tensors.keys() == expected[unit.name].keys()
        assert all(torch.equal(tensor, expected[unit.name][key]) for key, tensor in tensors.items())


def test_statistics_follow_and_stay_shared():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 8, generator=generator)
    shared = InputStatistics(inputs.T @ inputs / 40, inputs.abs().mean(0), tokens=40)
    assert shared.on(torch.device("cpu")) is shared
    elsewhere = shared.on(torch.device("meta"))
    assert {elsewhere.second_moment.device.type, elsewhere.mean_abs.device.type} == {"meta"}
    assert (elsewhere.tokens, elsewhere.drift) == (40, None)
    layers = [shared.of_layer(output_moment=torch.eye(3)), shared.of_layer()]
    assert layers[0].metric("full", 0.1) is layers[1].metric("full", 0.1, device=torch.device("cpu"))
    moved = layers[0].metric("diagonal", 0.1, device=torch.device("meta"))
    assert moved.factor.device.type == "meta"
    assert moved is layers[1].metric("diagonal", 0.1, device=torch.device("meta"))


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_gpu_finds_the_same(tmp_path):
    source = saved("llama", tmp_path)
    errors = [
        loftq.quantize_checkpoint(source, tmp_path / device, CONFIG, progress=False, device=device).error
        for device in ("cpu", "cuda")
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
