"""The benchmark of a Llama-2-7B-shaped checkpoint, with tiny sizes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

from loftq.bench.bounds import BOUNDS

ROOT = Path(__file__).parents[2]


def loaded(name: str, monkeypatch):
    """A module of ``benchmarks/``."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def shaped(monkeypatch):
    return loaded("llama_shaped", monkeypatch)


@pytest.fixture
def large(monkeypatch, tmp_path):
    module = loaded("large", monkeypatch)
    monkeypatch.setattr(sys.modules["common"], "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "PICTURE", tmp_path / "cost.png")
    return module


def test_the_shape_is_llama_2_7bs(shaped, large):
    whole = shaped.Shape()
    assert sum(i.nbytes // 2 for i in whole.tensors().values()) == 6_738_415_616  # as the model's card counts
    assert large.proportioned(32, 4096, 32000) == whole
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**whole.config()))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: info.shape for name, info in whole.tensors().items()} == expected
    layers = {n: i for n, i in whole.tensors().items() if ".layers.0." in n and len(i.shape) == 2}
    assert sum(i.nbytes // 2 for i in layers.values()) == whole.layer_weights()


def test_shards_load_and_hold_what_each_tensor_is_alone(shaped, tmp_path):
    shape = shaped.Shape(2, 64, 192, 96)
    written = []
    shaped.write_checkpoint(
        tmp_path, shape, seed=3, shard_bytes=60_000, advance=lambda name, weights: written.append(weights)
    )
    assert sum(written) == shape.nbytes // 2
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    name = "model.layers.1.mlp.down_proj.weight"
    stored = model.state_dict()[name]
    assert stored.dtype == torch.bfloat16
    assert torch.equal(stored, shaped.tensor(name, (64, 192), seed=3))
    assert not torch.equal(stored, shaped.tensor(name, (64, 192), seed=4))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(tmp_path / index[name], "pt") as file:
        assert torch.equal(file.get_tensor(name), stored)


def test_weights_have_heavy_tails_and_unlike_channels(shaped):
    weight = shaped.tensor("model.layers.0.self_attn.q_proj.weight", (1024, 1024)).float()
    assert 0.8 * shaped.STD < float(weight.std()) < 1.5 * shaped.STD
    assert abs(float(weight.mean())) < 1e-3
    kurtosis = float(((weight / weight.std()) ** 4).mean())
    assert kurtosis > 8, kurtosis  # 3 of a normal matrix
    for dim in (0, 1):
        scales = weight.abs().median(dim).values.log()
        assert float(scales.std()) == pytest.approx(shaped.CHANNEL_SPREAD, rel=0.15)


def test_a_full_disk_is_noticed_before_anything_is_written(large, tmp_path, monkeypatch):
    usage = large.shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(large.shutil, "disk_usage", lambda path: usage)
    folder = tmp_path / "work"
    with pytest.raises(SystemExit, match=r"has 1\.0 MB left, but this takes 18\.\d GB"):
        large.main(["--layers", "32", "--folder", str(folder)])
    assert list(folder.iterdir()) == []


def row(**changes) -> dict:
    values = {"bits": 2, "layers": 8, "seconds_32_layers": 1700.0, "peak_memory_bytes": 3 * 10**9}
    return values | changes


def test_every_bound_is_on_something_measured(large):
    cases = {c.name: c for bits in large.BITS for c in large.cases(row(bits=bits))}
    for bound in BOUNDS:
        if bound.suite == "large":
            assert bound.candidate in cases[bound.case].values
    met = {j.bound.case: j.met for c in large.cases(row()) for j in large.judge(c)}
    assert met == {"2 bits, 32 layers": True, "2 bits, peak memory": False}


@pytest.mark.parametrize("layers", [8, 32])
def test_the_time_for_32_layers(large, monkeypatch, tmp_path, layers):
    """8 layers of 10 s and 4 s outside; with 32 what is outside grows with the bytes."""
    modules = {f"model.layers.{i}.mlp.up_proj": 10.0 for i in range(layers)} | {"lm_head.weight": 1.0}
    timing = {"seconds": 10.0 * layers + 1, "peak_memory_bytes": 2 * 10**9, "modules": modules}
    totals = {"weights": 1, "bits_per_weight": 2.25, "mean_error": 0.3}
    monkeypatch.setattr(large, "run_loftq", lambda options: {"timing": timing, "totals": totals})
    monkeypatch.setattr(large, "baseline_memory", lambda: 10**9)
    clock = iter((0.0, 10.0 * layers + 4))
    monkeypatch.setattr(large.time, "perf_counter", lambda: next(clock))
    (tmp_path / "quantized-2bit").mkdir()
    shape = large.proportioned(layers, 4096, 32000)
    found = large.measure(shape, tmp_path / "source", 2, 64, 5, keep=False)
    assert found["seconds_per_layer"] == pytest.approx(10)
    assert found["measured_32_layers"] == (layers == 32)
    expected = 324 if layers == 32 else 320 + 4 * large.WHOLE.nbytes / shape.nbytes
    assert found["seconds_32_layers"] == pytest.approx(expected)
    assert ("measured" if layers == 32 else "projected") in large.told(found | {"seconds": 1.0})


@pytest.mark.slow  # quantizes in processes of their own
def test_one_layer_from_checkpoint_to_results(large, tmp_path, capsys):
    folder = tmp_path / "work"
    sizes = ["--layers", "1", "--width", "128", "--vocabulary", "256", "--rank", "8"]
    large.main([*sizes, "--iters", "1", "--folder", str(folder)])
    assert list(folder.iterdir()) == []
    found = json.loads((tmp_path / "results" / "large.json").read_text())
    assert found["command"].startswith("python benchmarks/large.py --layers 1 --width 128")
    assert [r["bits"] for r in found["rows"]] == [2, 4]
    for r in found["rows"]:
        assert r["quantized_weights"] == 4 * 128**2 + 3 * 128 * 320
        assert 0 < r["seconds_per_layer"] < r["seconds"]
        assert r["peak_memory_bytes"] > r["peak_above_python_and_torch"] > 0
        assert r["bits"] < r["bits_per_weight"] < r["bits"] + 0.3
    two, four = found["rows"]
    assert two["bytes_on_disk"] < four["bytes_on_disk"]
    assert two["mean_error"] > four["mean_error"]
    assert found["bounds"] == []  # of another shape


@pytest.mark.slow  # quantizes in processes of their own
def test_sweep(large, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    options = ["--bits", "2", "--rank", "4", "--iters", "1", "--folder", str(tmp_path / "work")]
    monkeypatch.setattr(large, "DEPTHS_WIDTH", 64)
    large.main(["--sweep", *options, "--widths", "64", "--depths", "1"])
    found = json.loads((tmp_path / "results" / "large_sweep.json").read_text())
    assert [(len(found[of]), found[of][0]["layers"]) for of in ("width", "depth")] == [(1, 2), (1, 1)]
    assert (tmp_path / "cost.png").stat().st_size > 5000
