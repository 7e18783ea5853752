"""Measured beside published; the measurements are made up."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from loftq.errors import ConfigError
from loftq.recipes import load_recipe
from loftq.recipes.comparison import Measurement, as_printed, compare, comparison_table
from loftq.recipes.steps import Options, plan_steps


def shown(recipe, measured) -> list[list[str]]:
    """The table's lines as lists of cells."""
    out = io.StringIO()
    Console(file=out, width=200).print(comparison_table(recipe, measured))
    lines = [line.split("  ") for line in out.getvalue().splitlines() if line.strip()]
    return [[cell.strip() for cell in line if cell.strip()] for line in lines]


def matched(seed: int, value: float | None, method: str = "loftq") -> Measurement:
    return Measurement(method, seed, "matched", {"accuracy": value, "loss": 1.0}, 100)


def test_median_of_the_seeds():
    recipe = load_recipe("glue/mnli-nf2-r16")
    lines = compare(recipe, [matched(0, 80.0), matched(1, 86.0), matched(2, 85.7)])
    line = next(x for x in lines if (x.method, x.metric) == ("loftq", "matched/accuracy"))
    assert (line.published, line.measured, line.lowest, line.highest, line.runs) == (84.7, 85.7, 80.0, 86.0, 3)
    others = [x for x in lines if x is not line]
    assert [(x.method, x.metric) for x in others] == [
        ("qlora", "matched/accuracy"),
        ("qlora", "mismatched/accuracy"),
        ("loftq", "mismatched/accuracy"),
    ]
    assert all(x.measured is None and x.runs == 0 for x in others)
    rows = shown(recipe, [matched(0, 80.0), matched(1, 86.0), matched(2, 85.7)])
    assert ["loftq", "matched/accuracy", "84.7", "85.70 (80.00 … 86.00)", "+1.00", "3"] in rows
    assert ["qlora", "matched/accuracy", "75.4"] in rows


def test_all_evaluations_together_count_by_their_examples():
    """ANLI has one number for its three rounds: (40 * 1000 + 50 * 1000 + 60 * 1200) / 3200 = 50.625."""
    recipe = load_recipe("anli/nf2-r16")
    rounds = [("r1", 40.0, 1000), ("r2", 50.0, 1000), ("r3", 60.0, 1200)]
    measured = [Measurement("loftq", 0, name, {"accuracy": value}, n) for name, value, n in rounds]
    line = compare(recipe, measured)[-1]
    assert (line.method, line.published) == ("loftq", 47.1)
    assert line.measured == pytest.approx(50.625, abs=1e-12)
    unfinished = compare(recipe, measured[:2])[-1]
    assert unfinished.measured is None, "a round is missing, its mean would be another number"


def test_not_converged_undefined_and_not_run():
    recipe = load_recipe("glue/stsb-nf2-r16")
    one = Measurement("loftq", 0, "validation", {"pearson": 50.0, "spearman": None}, 10)
    lines = {(x.method, x.metric): x for x in compare(recipe, [one])}
    assert lines["loftq", "pearson"].measured == 50.0
    assert (lines["loftq", "spearman"].measured, lines["loftq", "spearman"].runs) == (None, 0)
    rows = shown(load_recipe("glue/cola-nf2-r16"), [])
    assert ["qlora", "matthews", "N.A."] in rows
    rows = shown(load_recipe("glue/mnli-pruning-15"), [])
    assert rows[2][:3] == ["losparse", "matched/accuracy", "83.3"]
    assert "its published numbers only" in rows[2][3]


def test_a_method_without_a_published_number():
    recipe = load_recipe("glue/mnli-nf2-r16")
    assert ["loftq-data", "matched/accuracy", "90.00", "1"] in shown(recipe, [matched(0, 90.0, "loftq-data")])


def test_a_metric_that_the_evaluation_did_not_give():
    wrong = Measurement("loftq", 0, "validation", {"accuracy": 50.0}, 10)
    with pytest.raises(ConfigError, match="the evaluation validation gave accuracy, expected matthews; check"):
        compare(load_recipe("glue/cola-nf2-r16"), [wrong])


def test_from_what_an_evaluation_returns():
    result = {"accuracy": 91.5, "f1": None, "examples": 408, "predictions": "file.jsonl"}
    expected = Measurement("lora", 3, "validation", {"accuracy": 91.5, "f1": None}, 408)
    assert Measurement.from_result("lora", 3, "validation", result) == expected
    rouge = {"stem": True, "sentences": "rule"}
    assert Measurement.from_result("lora", 3, "validation", {**result, "rouge": rouge}) == replace(
        expected, rouge=rouge
    )


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("accuracy", 94.0, "94.0"),
        ("matched/accuracy", 89.9, "89.9"),
        ("rouge1", 43.4, "43.40"),
        ("rougeLsum", 35.2, "35.20"),
        ("perplexity", 5.7, "5.70"),
        ("matthews", None, "N.A."),
    ],
)
def test_digits_as_printed(metric, value, text):
    assert as_printed(metric, value) == text


def test_nothing_published():
    """A recipe of one's own: its metrics, what was measured, and no method but those that are named."""
    recipe = replace(load_recipe("glue/cola-nf2-r16"), published={})
    measured = [
        Measurement("loftq", seed, "validation", {"matthews": value}, 10) for seed, value in ((0, 40.0), (1, 44.0))
    ]
    (line,) = compare(recipe, measured)
    assert (line.method, line.metric, line.published, line.measured, line.runs) == ("loftq", "matthews", None, 42.0, 2)
    with pytest.raises(
        ConfigError, match="no published number of anything that loftq runs; name what to run with --methods"
    ):
        plan_steps(recipe, Options(Path("out")))
    assert {step.method for step in plan_steps(recipe, Options(Path("out"), methods=("qlora", "loftq")))} == {
        "qlora",
        "loftq",
    }
