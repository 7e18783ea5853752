"""Statistics of a whole model, streamed and live, and the file that keeps them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import loftq
from loftq.calibrate import CalibrationTokens, Statistics, collect_from_model
from loftq.calibrate.collect import collect
from loftq.checkpoint.source import sha256_file
from loftq.plan.targets import plan_modules
from loftq.solver.importance import InputStatistics
from tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def some_tokens() -> CalibrationTokens:
    ids = torch.randint(3, 96, (4, 10), generator=torch.Generator().manual_seed(5))
    mask = torch.arange(10) < torch.tensor([10, 4, 7, 10])[:, None]
    return CalibrationTokens.of(ids, mask, "random")


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "deberta-v2", "bart", "t5"])
def test_live_model_and_checkpoint_agree(name, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    targets = list(plan_modules(model, loftq.LoftQConfig()))
    seen: list[int] = []
    streamed = collect(tmp_path, targets, some_tokens(), batch_tokens=20, progress=lambda name, n: seen.append(n))
    live = collect_from_model(model.double(), targets, some_tokens(), batch_tokens=20, progress=False)
    assert set(streamed) == set(live) == set(targets)
    assert sum(seen) > 0
    for target in targets:
        a, b = streamed[target], live[target]
        assert a.tokens == b.tokens, target
        # a float32 pass against a float64 one, two layers deep
        torch.testing.assert_close(a.second_moment, b.second_moment, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.mean_abs, b.mean_abs, rtol=1e-4, atol=1e-5)
    assert streamed.summary["tokens"] == 31
    assert streamed.source_sha256 == {"model.safetensors": sha256_file(tmp_path / "model.safetensors")}
    assert live.source_sha256 == {}


def test_live_model_keeps_its_mode_and_hooks(tmp_path):
    model = tiny_model("llama").train()
    layer = model.model.layers[0].mlp.up_proj
    statistics = collect_from_model(model, ["model.layers.0.mlp.up_proj", "lm_head"], some_tokens(), progress=False)
    assert model.training
    assert not layer._forward_pre_hooks
    assert statistics["lm_head"].tokens == 31


@pytest.fixture
def saved(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shared = InputStatistics(torch.rand(8, 8, generator=generator), torch.rand(8, generator=generator), tokens=17)
    layers = {
        "a.q": shared,
        "a.k": shared,
        "a.v": shared.of_layer(
            output_moment=torch.rand(5, 5, generator=generator), guided_moment=torch.rand(8, 8, generator=generator)
        ),
        "b": InputStatistics(
            torch.rand(6, generator=generator), drift=torch.rand(6, 6), fisher_rows=torch.rand(3), fisher_columns=torch.rand(6)
        ),
        "never": InputStatistics(torch.zeros(4), torch.zeros(4), tokens=0),
    }  # fmt: skip
    statistics = Statistics(layers, {"name": "text", "sha256": "ab", "windows": 3}, {"model.safetensors": "f" * 64})
    statistics.save(tmp_path / "folder" / "s.safetensors")
    return statistics, tmp_path / "folder" / "s.safetensors"


def test_save_and_load(saved):
    statistics, path = saved
    loaded = Statistics.load(path, {"model.safetensors": "f" * 64})
    assert list(loaded) == list(statistics)
    assert (loaded.summary, loaded.source_sha256) == (statistics.summary, statistics.source_sha256)
    for name, entry in statistics.items():
        for field in (
            "second_moment",
            "mean_abs",
            "drift",
            "fisher_rows",
            "fisher_columns",
            "output_moment",
            "guided_moment",
            "tokens",
        ):
            before, after = getattr(entry, field), getattr(loaded[name], field)
            assert before == after if not isinstance(before, torch.Tensor) else torch.equal(before, after), (
                name,
                field,
            )
    assert loaded["a.q"] is loaded["a.k"]
    assert loaded["a.v"].second_moment is loaded["a.q"].second_moment
    assert loaded["a.v"].metric("full", 0.1) is loaded["a.q"].metric("full", 0.1)  # factored once
    assert len([n for n in load_file(path) if n.endswith("second_moment")]) == 3
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_statistics_of_another_model(saved):
    with pytest.raises(
        loftq.SourceError, match=r"of another model .*ffffffffffff, expected model.safetensors eeeeeeeeeeee"
    ):
        Statistics.load(saved[1], {"model.safetensors": "e" * 64})


def test_damaged_files(saved, tmp_path):
    path = saved[1]
    content = path.read_bytes()
    with pytest.raises(loftq.SourceError, match="does not exist"):
        Statistics.load(tmp_path / "nothing")
    for broken in (content[:-1], content[:40], b"", b"no safetensors at all"):
        path.write_bytes(broken)
        with pytest.raises(loftq.SourceError, match=r"s\.safetensors"):
            Statistics.load(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(loftq.SourceError, match="no intact statistics"):
        Statistics.load(path)
    for change in ({"format": 9}, {"layers": {"a": {"tokens": 1, "second_moment": "gone"}}}, {"layers": {"a": 3}}):
        described = {"format": 1, "layers": {}, "summary": {}, "source_sha256": {}, **change}
        save_file({"a": torch.zeros(2)}, path, metadata={"loftq_statistics": json.dumps(described)})
        with pytest.raises(loftq.SourceError, match="no intact statistics"):
            Statistics.load(path)


def test_a_folder_that_cannot_be_written(saved, tmp_path):
    statistics, path = saved
    before = path.read_bytes()
    with pytest.raises(loftq.OutputError):
        statistics.save(path / "below-a-file.safetensors")
    assert path.read_bytes() == before


def test_a_model_without_text(tmp_path):
    import transformers as tf

    config = tf.ViTConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32
    )
    tf.ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(loftq.SourceError, match="takes no input_ids"):
        collect(tmp_path, [], some_tokens())
