"""Running the steps in order, remembering them, and the one place where training is called."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as tf

import loftq.data.rows
from letters import letters
from loftq.errors import ConfigError, OutputError, SourceError
from loftq.evaluate.predictions import read_predictions
from loftq.recipes import load_recipe, reproduce
from loftq.recipes.comparison import Measurement
from loftq.recipes.local import find_local
from loftq.recipes.reproduce import RESULTS, measurements, run_step
from loftq.recipes.steps import EVALUATE, QUANTIZE, Options, plan_steps

RECIPE = "glue/mnli-nf2-r16"


@pytest.fixture(autouse=True)
def hub(monkeypatch) -> list[dict]:
    """Rows that the hub has for every data set; no test goes there."""
    rows = [{"premise": "a", "hypothesis": "b", "label": 1}, {"premise": "a", "hypothesis": "", "label": 2}]
    monkeypatch.setattr(loftq.data.rows, "hub_rows", lambda *name, **what: iter(rows))
    return rows


class Engine:
    """Remembers its steps; gives each evaluation another accuracy."""

    def __init__(self, fails_at: str | None = None) -> None:
        self.steps: list[str] = []
        self.fails_at = fails_at

    def __call__(self, step, progress):
        if step.name == self.fails_at:
            raise KeyboardInterrupt
        self.steps.append(step.name)
        return {"accuracy": 50.0 + len(self.steps), "examples": 10} if step.kind == EVALUATE else {}


def run(out: Path, engine: Engine, name: str = RECIPE, **options: object) -> list[tuple[str, bool]]:
    found = reproduce.reproduce(load_recipe(name), Options(out, **options), run=engine)
    return [(step.name, fresh) for step, fresh in found]


def test_steps_and_measurements(tmp_path):
    engine = Engine()
    done = run(tmp_path / "out", engine, methods=("loftq",))
    expected = [
        "quantize/loftq",
        "train/loftq/seed-0",
        "evaluate/loftq/seed-0/matched",
        "evaluate/loftq/seed-0/mismatched",
    ]
    assert done == [(name, True) for name in expected]
    assert engine.steps == expected
    assert measurements(tmp_path / "out") == [
        Measurement("loftq", 0, "matched", {"accuracy": 53.0}, 10),
        Measurement("loftq", 0, "mismatched", {"accuracy": 54.0}, 10),
    ]
    assert measurements(tmp_path / "nothing") == []


def test_continues_where_it_was(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Engine("evaluate/loftq/seed-0/mismatched"), methods=("loftq",))
    again = Engine()
    done = run(tmp_path, again, methods=("loftq",), seeds=(0, 1))
    assert again.steps == [
        "evaluate/loftq/seed-0/mismatched",
        "train/loftq/seed-1",
        "evaluate/loftq/seed-1/matched",
        "evaluate/loftq/seed-1/mismatched",
    ]
    assert [fresh for _, fresh in done] == [False] * 3 + [True] * 4
    assert [(m.seed, m.evaluation) for m in measurements(tmp_path)] == [
        (seed, name) for seed in (0, 1) for name in ("matched", "mismatched")
    ]


def test_another_run_in_the_same_folder(tmp_path):
    run(tmp_path / "a", Engine(), methods=("loftq",))
    with pytest.raises(OutputError, match="holds a reproduction with another limit; choose another folder"):
        run(tmp_path / "a", Engine(), methods=("loftq",), limit=3)
    with pytest.raises(OutputError, match="with another model"):
        run(tmp_path / "a", Engine(), model="my-model")
    with pytest.raises(OutputError, match="with another recipe"):
        run(tmp_path / "a", Engine(), "glue/mnli-nf2-r32")
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match="holds something else than a reproduction"):
        run(tmp_path, Engine())
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_quantize_is_real(stories_dir, tmp_path):
    """The step's folder is what `quantize_checkpoint` makes of the recipe's configuration, and loads."""
    changes = ["quantization.rank=4", "quantization.num_iter=1"]
    recipe = load_recipe("gsm8k/llama2-7b-nf2.5-r64", changes)
    step = plan_steps(recipe, Options(tmp_path, model=str(stories_dir)))[0]
    assert step.kind == QUANTIZE
    totals = run_step(step, progress=False)
    report = loftq.QuantizationReport.load(tmp_path / "loftq" / "quantized")
    assert report.config == json.loads(json.dumps(recipe.loftq_config("loftq").to_dict()))
    assert totals["modules"] == len(report.modules) == 35
    assert report.command == step.command
    assert {m.bits for m in report.modules} == {4}, "all 5 layers are among the first 8"
    assert loftq.load(tmp_path / "loftq" / "quantized").peft_config["default"].r == 4


def test_every_step_is_real(stories_dir, tmp_path):
    """A recipe of the paper on a tiny encoder and 24 rows: quantize, train, evaluate, and again without doing anything."""
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=len(letters()), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    tf.BertModel(config).save_pretrained(tmp_path / "model")
    letters(pair=True).save_pretrained(tmp_path / "model")
    changes = ["training.epochs=2", "quantization.rank=4", "quantization.quantize_embeddings=false"]
    recipe = load_recipe("glue/sst2-nf2-r16", changes)
    local = find_local(recipe, stories_dir.parent / "glue_sst2")
    options = Options(tmp_path / "out", methods=("loftq", "lora"), model=str(tmp_path / "model"), local=local, limit=24)
    done = [(s.name, fresh) for s, fresh in reproduce.reproduce(recipe, options, progress=False)]
    assert [name for name, fresh in done if fresh] == [
        "quantize/loftq",
        "train/loftq/seed-0",
        "evaluate/loftq/seed-0/validation",
        "train/lora/seed-0",
        "evaluate/lora/seed-0/validation",
    ]
    found = measurements(tmp_path / "out")
    assert [(m.method, m.examples) for m in found] == [("loftq", 24), ("lora", 24)]
    for measured in found:
        rows = read_predictions(tmp_path / "out" / measured.method / "seed-0" / "predictions-validation.jsonl")
        assert len(rows) == 24
        assert 100 * sum(row.score for row in rows) / 24 == pytest.approx(measured.metrics["accuracy"])
    assert all(0 <= m.metrics["accuracy"] <= 100 for m in found)
    assert not any(fresh for _, fresh in reproduce.reproduce(recipe, options, progress=False))


def test_settings_are_checked_before_the_first_step(monkeypatch, tmp_path):
    def refuse(values):
        raise ConfigError(f"max_length is {values['data']['max_length']}")

    monkeypatch.setattr(reproduce, "TrainSettings", SimpleNamespace(from_dict=refuse))
    with pytest.raises(ConfigError, match="max_length is 128"):
        next(reproduce.reproduce(load_recipe(RECIPE), Options(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("sentence,label\n", "validation.csv has no rows"),
        (
            "sentence,label\na,1\nb,7\n",
            "line 3 has the label '7', expected one of the classes asked for: negative, positive",
        ),
        ("sentence,label\na,1\n,0\n", "line 3: sentence is empty, expected a text"),
    ],
    ids=["no rows", "class", "empty"],
)
def test_rows_to_measure_on_are_checked_before_the_first_step(tmp_path, rows, message):
    """Not after hours of training."""
    (tmp_path / "train.csv").write_text("sentence,label\na,1\nb,0\n")
    (tmp_path / "validation.csv").write_text(rows)
    recipe = load_recipe("glue/sst2-nf2-r16")
    options = Options(tmp_path / "out", methods=("lora",), local=find_local(recipe, tmp_path))
    with pytest.raises(SourceError, match=message):
        next(reproduce.reproduce(recipe, options, run=lambda *step: pytest.fail("a step was run")))
    assert not (tmp_path / "out").exists()


def test_rows_of_the_hub_are_looked_at_before_the_first_step(tmp_path, hub):
    run(tmp_path / "done", Engine(), methods=("loftq",))
    hub[0] = {"question": "a", "label": 1}
    with pytest.raises(SourceError, match="row 0 has no column 'premise', it has question, label"):
        run(tmp_path / "out", Engine(), methods=("loftq",))
    assert not (tmp_path / "out").exists()
    assert not any(fresh for _, fresh in run(tmp_path / "done", Engine(), methods=("loftq",)))
    hub[:] = [{"premise": "a", "hypothesis": "b", "label": 1}] * reproduce.HUB_ROWS + [{}]
    run(tmp_path / "out", Engine(), methods=("loftq",))


def test_the_file_is_readable(tmp_path):
    run(tmp_path, Engine(), methods=("loftq",), limit=3)
    values = json.loads((tmp_path / RESULTS).read_text(encoding="utf-8"))
    assert (values["recipe"]["name"], values["limit"], values["model"]) == (RECIPE, 3, None)
    assert values["done"][0] == "quantize/loftq"
    assert values["measured"][0] == {
        "method": "loftq",
        "seed": 0,
        "evaluation": "matched",
        "metrics": {"accuracy": 53.0},
        "examples": 10,
    }
