"""``loftq reproduce``: the list, the dry run, the table at the end, and a mistake in one sentence."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loftq.cli import app, main
from loftq.errors import ConfigError
from loftq.recipes import list_recipes, reproduce
from loftq.recipes.steps import EVALUATE


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["reproduce", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def cells(text: str) -> list[list[str]]:
    """The lines of a table as lists of cells."""
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]
    return [line for line in lines if line]


def test_list_is_grouped_by_table():
    text = invoke("--list")
    assert all(f"{name} " in text for name in list_recipes())
    assert "120 recipes; `loftq reproduce NAME --dry-run` shows what one does" in text
    lines = cells(invoke("glue/mnli-*-r32", "--list"))
    titles = [line[0] for line in lines if len(line) == 1 and line[0][0] != "─"]
    assert titles[:3] == [
        "DeBERTaV3-base, NormalFloat at 2 bits (table 1)",
        "DeBERTaV3-base, NormalFloat at 4 bits",
        "Order of the two steps, uniform at 2 bits (table 6)",
    ]
    row = lines.index(["glue/mnli-nf4-r32", "qlora", "matched/accuracy, mismatched/accuracy", "89.9/89.9"])
    assert lines[row + 1] == ["loftq", "matched/accuracy, mismatched/accuracy", "89.9/90.0"]
    assert ["glue/cola-nf2-r16", "qlora", "matthews", "N.A."] in cells(invoke("glue/cola*", "--list"))


def test_list_as_json():
    found = json.loads(invoke("xsum/*-r8", "--list", "--json"))
    assert [recipe["name"] for recipe in found] == list_recipes("xsum/*-r8")
    assert found[1]["published"]["qlora"] == {"rouge1": None, "rouge2": None, "rougeLsum": None}


def test_dry_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = invoke("gsm8k/llama2-7b-nf2.25-r64", "--dry-run", "--seeds", "0,1", "--limit", "8")
    commands = [line for line in text.splitlines() if line.startswith("loftq ")]
    assert [line.split()[1] for line in commands] == ["quantize", "train", "evaluate", "train", "evaluate"]
    out = "reproduce/gsm8k/llama2-7b-nf2.25-r64/loftq"
    assert commands[0] == (
        f"loftq quantize meta-llama/Llama-2-7b-hf --out {out}/quantized --bits 2 --rank 64 --iters 5 --published "
        f"--method loftq --svd exact --first-layers-bits 4:4"
    )
    rows = cells(text)
    assert ["weight_decay", "0.1", "as in the authors' script"] in rows
    assert ["lora_alpha", "the default", "the rank, a scaling of 1"] in rows
    assert ["batch_size", "16"] in rows, "stated, so without a remark"
    assert ["loftq", "gsm8k", "26.5"] in rows
    assert ["qlora", "gsm8k", "N.A."] in rows
    assert "The published numbers are medians of 5 seeds; 2 here." in text
    assert "Run with 8 examples of each split: not comparable with the published numbers." in text
    assert not list(tmp_path.iterdir())


def test_dry_run_with_a_model_and_data_that_are_here(stories_dir):
    data = stories_dir.parent / "gsm8k"
    options = ["--local", data, "--model", stories_dir, "--out", "o", "--dry-run", "--set", "quantization.rank=4"]
    text = invoke("gsm8k/llama2-7b-nf4-r64", *options)
    assert "35 modules (35 of 4 bits), 226,560 weights at 4 bits on average" in text
    assert f"Run with the model {stories_dir}: not comparable" in text
    assert any(row[0] == "train" and row[-1] == "question = prompt, answer = completion" for row in cells(text))
    found = json.loads(invoke("gsm8k/llama2-7b-nf4-r64", *options, "--json"))
    assert found["modules"]["loftq"]["modules"] == 35
    assert found["local"]["test"]["file"] == str(data / "test.jsonl")
    assert found["steps"][1]["arguments"]["settings"]["data"]["data"] == str(data / "train.jsonl")
    assert found["recipe"]["quantization"]["rank"] == 4


def test_a_run_ends_with_measured_beside_published(tmp_path, monkeypatch):
    """Quantizing, training and evaluating are made up; what is done with them is not."""

    def run_step(step, progress):
        return {"accuracy": 80.0 + step.seed, "examples": 4} if step.kind == EVALUATE else {}

    work = reproduce.reproduce
    monkeypatch.setattr(reproduce, "reproduce", lambda *given: work(*given, run=run_step))
    row = {"premise": "a", "hypothesis": "b", "label": 1}
    monkeypatch.setattr("loftq.data.rows.hub_rows", lambda *given, **options: iter([row]))
    options = ["glue/mnli-nf2-r16", "--methods", "loftq", "--seeds", "0,2", "--out", tmp_path / "out"]
    text = invoke(*options)
    assert ["loftq", "matched/accuracy", "84.7", "81.00 (80.00 … 82.00)", "-3.70", "2"] in cells(text)
    shown = json.loads(invoke(*options, "--json", "--limit", "3", "--out", tmp_path / "few"))
    assert (shown["limit"], shown["model"]) == (3, "microsoft/deberta-v3-base")
    assert any("not comparable with the published numbers" in note for note in shown["notes"])
    found = json.loads(invoke(*options, "--json"))["results"]
    assert [(line["method"], line["measured"], line["published"]) for line in found] == [
        ("qlora", None, 75.4),
        ("qlora", None, 75.6),
        ("loftq", 81.0, 84.7),
        ("loftq", 81.0, 85.1),
    ]


def test_texts_that_are_too_long_are_refused_before_anything_is_done(llama, sums, tmp_path, monkeypatch):
    """A model with 128 positions; the recipe wants more to read, and more to write."""
    monkeypatch.setattr(reproduce, "run_step", lambda *given: pytest.fail("begun"))
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        row = {"question": "1+1=", "answer": "2"}
        (tmp_path / "data" / f"{split}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    options = ["gsm8k/llama2-7b-nf4-r64", "--local", tmp_path / "data", "--model", llama.parent / "source"]
    options += ["--out", tmp_path / "out", "--set", "quantization.rank=4"]
    for more in ([], ["--dry-run"]):
        with pytest.raises(ConfigError, match="max_length is 512, but the model has 128 positions"):
            invoke(*options, *more)
        with pytest.raises(
            ConfigError, match="max_new_tokens is 256, but the model has 128 positions; lower it with --set"
        ):
            invoke(*options, "--set", "training.max_length=64", *more)
    assert not (tmp_path / "out").exists()


MISTAKES = {
    "no name": ([], "no recipe is named, expected `loftq reproduce NAME`; --list shows the names"),
    "unknown": (["glue/mnli-nf2"], "no recipe is called 'glue/mnli-nf2'; did you mean"),
    "pattern": (["zz*", "--list"], "no recipe is called 'zz*'"),
    "seeds": (["glue/mnli-full", "--seeds", "one"], "--seeds is 'one', expected integers with commas"),
    "no seeds": (["glue/mnli-full", "--seeds", ","], "--seeds is ',', expected integers"),
    "limit": (["glue/mnli-full", "--limit", "0"], "limit is 0"),
    "methods": (["glue/mnli-nf2-r16", "--methods", "loft"], "a method is 'loft'; did you mean loftq?"),
    "local": (["glue/mnli-full", "--local", "nowhere"], "nowhere is no folder"),
    "file": (["glue/mnli-full", "--local", ".", "--file", "train"], "--file is 'train', expected SPLIT=FILE"),
    "file alone": (["glue/mnli-full", "--file", "train=a.tsv"], "--file was given without --local"),
    "set": (["glue/mnli-full", "--set", "training.epoch=1"], "training has no option 'epoch', did you mean 'epochs'?"),
    "own file": (["mine.yaml"], "mine.yaml cannot be read"),
    "model": (["glue/mnli-nf2-r16", "--model", "no/such/model"], "no/such/model does not exist"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    dry = [] if "--list" in arguments else ["--dry-run"]
    monkeypatch.setattr(sys, "argv", ["loftq", "reproduce", *arguments, *dry])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err.startswith("loftq: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1, captured.err
    assert not list(Path().iterdir())
