"""Ranks and alphas of a quantized folder hold in models of other classes, whose modules have other names."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from loftq.data.prepare import DataSettings
from loftq.finetune.load import load_run
from loftq.finetune.model import build, find_start
from loftq.finetune.run import train
from loftq.finetune.settings import TrainSettings
from loftq.hub.load import load
from loftq.report.record import QuantizationReport
from small import quantized_bert, quantized_llama

MAKE = {"llama": quantized_llama, "bert": quantized_bert}
PATTERNS = {"llama": {"q_proj": 2, "layers.1.mlp.down_proj": 16}, "bert": {"query": 2, "layer.1.output.dense": 16}}
PREFIX = {"llama": "", "bert": "bert."}  # of names in the model of the task


def settings(data: str) -> TrainSettings:
    held = DataSettings("classification", data)
    return TrainSettings(held, held, max_steps=2, batch_size=12)


@pytest.mark.parametrize("embeddings", [False, True], ids=["", "embeddings"])
@pytest.mark.parametrize("alpha", [None, 24], ids=["alpha of the ranks", "one alpha"])
@pytest.mark.parametrize("name", MAKE)
def test_ranks_and_alphas_of_the_folder(tmp_path, letters_a_or_b, name, alpha, embeddings):
    options = {"lora_alpha": alpha, "rank_pattern": PATTERNS[name], "quantize_embeddings": embeddings}
    folder = MAKE[name](tmp_path, num_iter=1, **options)
    report = QuantizationReport.load(folder)
    ranks = {PREFIX[name] + m.name: m.rank for m in report.modules}
    assert set(ranks.values()) == {2, 8, 16}
    model, heads = build(find_start("loftq", folder, None), settings(letters_a_or_b), ["first", "second"])
    assert heads
    layers = {
        n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, LoraLayer) and m.r
    }
    assert {n: m.r["default"] for n, m in layers.items()} == ranks
    assert {n: m.scaling["default"] for n, m in layers.items()} == {
        n: 1.0 if alpha is None else alpha / r for n, r in ranks.items()
    }
    # the fitted factors stand in them, at the folder's own scaling
    fitted = load(folder)
    for n, m in fitted.named_modules():
        if isinstance(m, LoraLayer):
            ours = layers[PREFIX[name] + n.removeprefix("base_model.model.")]
            assert ours.scaling["default"] == m.scaling["default"]
            assert ours.get_delta_weight("default").equal(m.get_delta_weight("default")), n
    check_saved(folder, tmp_path, letters_a_or_b, ranks, layers)


def check_saved(folder: Path, tmp_path: Path, data: str, ranks: dict[str, int], layers: dict[str, LoraLayer]) -> None:
    """A run of it saves these ranks and loads again with the same scalings."""
    train(tmp_path / "run", settings(data), init_from=folder, progress=False)
    kept = load_file(tmp_path / "run" / "adapter_model.safetensors")
    for name, rank in ranks.items():
        found = [t for n, t in kept.items() if n.startswith(f"base_model.model.{name}.lora") and "_A" in n]
        assert [rank in t.shape for t in found] == [True], name
    again, _ = load_run(tmp_path / "run")
    for n, m in again.named_modules():
        if isinstance(m, LoraLayer) and m.r:
            assert m.scaling["default"] == layers[n.removeprefix("base_model.model.")].scaling["default"], n
