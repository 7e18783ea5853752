"""The paper's compression ratios from configurations alone, and the page that shows them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from loftq.checkpoint.naming import meta_model
from loftq.checkpoint.source import open_config
from loftq.report.memory.paper import BEST, MODELS, TABLE, accountings, footprint

ROOT = Path(__file__).resolve().parents[2]

# Parameters as the models' cards give them: LLAMA-2 to the unit, the others rounded to millions. DeBERTaV3-base: 86 M
# backbone and 98 M embedding.
PARAMETERS = {
    "deberta-v3-base": (184e6, 0.5e6),
    "bart-large": (406e6, 0.5e6),
    "llama-2-7b": (6_738_415_616, 0),
    "llama-2-13b": (13_015_864_320, 0),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_configurations_are_the_published_models(name):
    expected, tolerance = PARAMETERS[name]
    model = meta_model(open_config(MODELS / name))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(expected, abs=tolerance)


# Weights of the quantized matrices and parameters of adapters of rank 1, by hand: a layer of DeBERTa has four matrices of
# 768 × 768 and two of 768 × 3,072; BART's encoder four of 1,024 × 1,024 and two of 1,024 × 4,096, its decoder four more;
# LLAMA's four of h × h and three of h × f.
MATRICES = {
    "deberta-v3-base": (12 * (4 * 768**2 + 2 * 768 * 3072), 12 * (4 * 2 * 768 + 2 * (768 + 3072))),
    "bart-large": (12 * (12 * 1024**2 + 4 * 1024 * 4096), 12 * (12 * 2 * 1024 + 4 * (1024 + 4096))),
    "llama-2-7b": (32 * (4 * 4096**2 + 3 * 4096 * 11008), 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))),
    "llama-2-13b": (40 * (4 * 5120**2 + 3 * 5120 * 13824), 40 * (4 * 2 * 5120 + 3 * (5120 + 13824))),
}


def row_id(row) -> str:
    return f"{row.model} {row.quantizer}{row.bits} r{row.rank}"


@pytest.mark.parametrize("row", TABLE, ids=row_id)
def test_published_ratio(row):
    compression, trainable = BEST.ratios(row)
    weights, adapters = MATRICES[row.model]
    bits = row.bits + (16 / 64 if row.quantizer == "nf" else 0)
    assert compression == pytest.approx(100 * (weights * bits + 16 * row.rank * adapters) / (16 * weights))
    assert trainable == pytest.approx(100 * row.rank * adapters / weights)
    assert compression == pytest.approx(row.compression, abs=0.2), "0.3 percentage points are asked for"
    assert trainable == pytest.approx(row.trainable, abs=0.1)


def test_no_other_reading_comes_near():
    differences = sorted(a.largest_difference() for a in accountings())
    assert BEST.largest_difference() == differences[0] < 0.2
    assert differences[1] > 0.9
    assert min(a.largest_difference() for a in accountings() if a.scope != "matrices") > 9


def test_llama_trainable_ratio_of_the_whole_model_rounds_as_published():
    for row in TABLE[-4:]:
        assert round(100 * footprint(row).trainable_share, 1) == row.trainable


@pytest.mark.parametrize("row", TABLE, ids=row_id)
def test_what_is_stored_differs_by_the_scales(row):
    """Blocks of 64 with a float32 scale, or with a float16 scale and zero point: half a bit a weight either way."""
    stored = footprint(row)
    counted = 16 if row.quantizer == "nf" else 0
    expected = BEST.ratios(row)[0] + 100 * (32 - counted) / 64 / 16
    assert 100 * stored.compression_ratio == pytest.approx(expected, abs=0.01)  # codebooks: some bytes a matrix


def script(name: str, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_recorded_rows_are_what_the_code_gives(monkeypatch):
    module = script("table7", monkeypatch)
    record = json.loads(module.COPY.read_text(encoding="utf-8"))
    assert record["rows"] == [module.ratios(row) for row in TABLE]
    assert record["readings"] == module.readings()


@pytest.mark.parametrize("name", ["table7", "training_memory"])
def test_the_page_shows_what_is_recorded(name, monkeypatch, tmp_path):
    module = script(name, monkeypatch)
    assert module.main(["--check"]) == 0, f"run python benchmarks/{name}.py"
    page = tmp_path / "memory.md"
    text = module.PAGE.read_text(encoding="utf-8")
    changed = "17.19 (3.12)" if name == "table7" else "32.9 MB"
    assert changed in text
    page.write_text(text.replace(changed, "9.9"), encoding="utf-8")
    monkeypatch.setattr(module, "PAGE", page)
    assert module.main(["--check"]) == 1


def test_numbers_in_the_pages_text(monkeypatch):
    text = " ".join(script("table7", monkeypatch).PAGE.read_text(encoding="utf-8").split())
    deberta, llama = footprint(TABLE[0]), [footprint(TABLE[k]) for k in (-4, -2)]
    per_weight = [
        100 * extra / 64 / 16 for extra in (32 - 16, 32)
    ]  # float32 instead of 16 bits; two float16 for nothing
    for shown in (
        f"The largest difference, {BEST.largest_difference():.2f} points for BART-large NF2 at rank 16",
        f"= 14.06 % + 3.125 % = {BEST.ratios(TABLE[2])[0]:.2f} %",
        f"included, they are {100 * llama[0].trainable_share:.2f} and {100 * llama[1].trainable_share:.2f} and round",
        f"a quarter: {per_weight[0]:.2f} points more",
        f"does not count: {per_weight[1]:.2f} points more",
        f"({128_100 * 768 / 1e6:.1f} of {deberta.model_parameters / 1e6:.1f} million)",
    ):
        assert shown in text, shown


@pytest.mark.slow  # six models of 7 and 13 billion parameters, half a minute
def test_recorded_training_memory_is_what_the_code_gives(monkeypatch):
    module = script("table7", monkeypatch)
    assert json.loads(module.COPY.read_text(encoding="utf-8"))["training"] == module.training()
