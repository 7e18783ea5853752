"""The steps of every recipe: configurations, training settings and command lines."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

import loftq.pipeline
from loftq.cli import app
from loftq.config import LoftQConfig
from loftq.data.prepare import DataSettings
from loftq.errors import ConfigError
from loftq.evaluate.task import metrics_of
from loftq.finetune.settings import TrainSettings
from loftq.recipes import list_recipes, load_recipe
from loftq.recipes.dryrun import dry_run
from loftq.recipes.local import LocalSplit
from loftq.recipes.steps import EVALUATE, QUANTIZE, TRAIN, Options, Step, plan_steps

ROLES = {
    "causal": {"text"},
    "completion": {"prompt", "completion"},
    "classification": {"text", "text_pair", "label"},
    "regression": {"text", "text_pair", "label"},
    "qa": {"id", "context", "question", "answers"},
    "summarization": {"text", "summary"},
}


def steps(name: str, **options: object) -> list[Step]:
    return plan_steps(load_recipe(name), Options(Path("out"), **options))


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_dry_runs(name):
    recipe = load_recipe(name)
    found = dry_run(recipe, Options(Path("out")))
    assert {step.method for step in found.steps} == set(recipe.runnable())
    names = [step.name for step in found.steps]
    assert len(set(names)) == len(names)
    for step in found.steps:
        assert step.arguments == json.loads(json.dumps(step.arguments)), "arguments are plain data"
        if step.kind == QUANTIZE:
            config = LoftQConfig.from_dict(step.arguments["config"])
            assert config == recipe.loftq_config(step.method)
            continue
        if step.kind == TRAIN:
            settings = TrainSettings.from_dict(step.arguments["settings"])
            data = settings.data
            assert settings.eval_data is None, "no checkpoint is chosen by the data it is measured on"
        else:
            data = DataSettings.from_dict(step.arguments["data"])
            assert set(step.arguments["metrics"]) <= set(metrics_of(data.task))
        assert set(data.map.values()) <= ROLES[data.task], data.map


def test_order_and_folders():
    found = steps("glue/mnli-nf2-r16", seeds=(0, 7))
    assert [step.name for step in found[:7]] == [
        "quantize/qlora",
        "train/qlora/seed-0",
        "evaluate/qlora/seed-0/matched",
        "evaluate/qlora/seed-0/mismatched",
        "train/qlora/seed-7",
        "evaluate/qlora/seed-7/matched",
        "evaluate/qlora/seed-7/mismatched",
    ]
    quantize, train, matched, mismatched = found[:4]
    assert quantize.arguments["source"] == "microsoft/deberta-v3-base"
    assert train.arguments["init_from"] == quantize.arguments["out"] == "out/qlora/quantized"
    assert train.arguments["model"] is None
    assert matched.arguments["run"] == train.arguments["out"] == "out/qlora/seed-0"
    assert train.arguments["settings"] == {
        "data": {
            "task": "classification",
            "data": "nyu-mll/glue:mnli",
            "split": "train",
            "map": {"premise": "text", "hypothesis": "text_pair", "label": "label"},
            "labels": ["entailment", "neutral", "contradiction"],
            "max_length": 128,
            "join_rows": False,
            "prompt_template": "{prompt}",
            "limit": None,
        },
        "method": "qlora",
        "epochs": 5,
        "batch_size": 32,
        "gradient_accumulation": 1,
        "learning_rate": 1e-4,
        "schedule": "linear",
        "warmup_ratio": 0.0,
        "weight_decay": 0.0,
        "num_beams": 1,
        "seed": 0,
        "rouge_stem": True,
        "metrics": ["accuracy"],
    }
    assert mismatched.arguments["data"]["split"] == "validation_mismatched"
    assert found[4].arguments["settings"]["seed"] == 7


def test_full_fine_tuning_and_lora_quantize_nothing():
    train, evaluate = steps("gsm8k/phi2-full")
    assert (train.kind, train.arguments["model"], train.arguments["init_from"]) == (TRAIN, "microsoft/phi-2", None)
    assert evaluate.arguments["run"] == "out/full/seed-0"
    train, evaluate = steps("gsm8k/phi2-lora-r64")
    assert train.arguments["settings"]["rank"] == 64
    assert train.arguments["settings"]["target_modules"] == "all-linear"
    assert evaluate.arguments["run"] == "out/lora/seed-0"


def test_lora_has_the_adapter_of_the_recipe():
    """All of it that is not the quantizer, so that its scaling is that of the quantized starts beside it."""
    given = {"rank": 8, "lora_alpha": 16, "use_rslora": True, "lora_dropout": 0.1}
    recipe = replace(load_recipe("gsm8k/llama2-7b-nf4-r64"), quantization=given)
    (train, _) = plan_steps(recipe, Options(Path("out"), methods=("lora",)))
    assert {key: train.arguments["settings"][key] for key in given} == given
    assert "--use-rslora" in train.command
    assert "--lora-dropout 0.1" in train.command
    for lost in ({"exclude_modules": ["k_proj"]}, {"rank_pattern": {"k_proj": 4}}):
        recipe = replace(recipe, quantization={**given, **lost})
        with pytest.raises(ConfigError, match=f"has {next(iter(lost))}, which training an adapter on the original"):
            plan_steps(recipe, Options(Path("out"), methods=("lora",)))


def test_a_gguf_file_has_no_config_to_check_lengths_by(tmp_path):
    (tmp_path / "model.gguf").touch()
    recipe, options = load_recipe("gsm8k/llama2-7b-nf4-r64"), Options(Path("out"), model=str(tmp_path / "model.gguf"))
    assert set(dry_run(recipe, options).modules.values()) == {None}


def test_the_folder_may_be_below_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/mine")
    assert Options("~/rep").out == Path("/home/of/mine/rep")


def test_methods_models_limits():
    found = steps("glue/cola-nf2-r16", methods=("qlora", "lora", "loftq-data"), model="my-model", limit=8)
    assert list(dict.fromkeys(s.method for s in found)) == ["qlora", "lora", "loftq-data"]
    assert {s.arguments["source"] for s in found if s.kind == QUANTIZE} == {"my-model"}
    assert {s.arguments["settings"]["data"]["limit"] for s in found if s.kind == TRAIN} == {8}
    assert {s.arguments["data"]["limit"] for s in found if s.kind == EVALUATE} == {8}
    methods = {s.method: s.arguments["settings"]["method"] for s in found if s.kind == TRAIN}
    assert methods == {"qlora": "qlora", "lora": "lora", "loftq-data": "loftq"}


def test_local_files_take_the_hubs_place():
    local = {
        "train": LocalSplit("train", Path("d/train.tsv"), ("a",), {"3": "text", "1": "label"}),
        "validation": LocalSplit("validation", Path("d/dev.csv"), ("a",), {"sentence": "text", "label": "label"}),
    }
    _, train, evaluate = steps("glue/cola-nf2-r16", local=local)
    data = train.arguments["settings"]["data"]
    assert (data["data"], data["map"]) == ("d/train.tsv", {"3": "text", "1": "label"})
    data = evaluate.arguments["data"]
    assert (data["data"], data["map"]) == ("d/dev.csv", {"sentence": "text", "label": "label"})
    assert "--data d/dev.csv" in evaluate.command
    assert "--map 3=text --map 1=label" in train.command


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("glue/mnli-pruning-15", {"methods": ("losparse",)}, "losparse is not run by loftq (LoSparse"),
        ("xsum/bart-full", {"methods": ("lead-3",)}, "lead-3 is not run by loftq (the document's first three"),
        ("glue/mnli-nf2-r16", {"methods": ("lofq",)}, "a method is 'lofq'; did you mean loftq?"),
        ("glue/mnli-full", {"methods": ("loftq",)}, "glue/mnli-full is full fine-tuning"),
        ("glue/mnli-full", {"methods": ("lora",)}, "describes no adapter; choose another recipe for lora"),
        ("glue/mnli-nf2-r16", {"limit": 0}, "limit is 0, expected an integer of at least 1"),
        ("glue/mnli-nf2-r16", {"seeds": ()}, "seeds is empty, expected different integers"),
        ("glue/mnli-nf2-r16", {"seeds": (1, 1)}, "seeds is 1, 1, expected different integers"),
        ("glue/mnli-nf2-r16", {"seeds": (-1,)}, "seed is -1"),
    ],
)
def test_refusals(name, options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        steps(name, **options)


class Captured(Exception):
    """Instead of quantizing."""


def capture(source, out, config, **options):
    raise Captured(str(source), options["revision"], str(out), config)


def test_quantize_commands_mean_what_the_steps_do(monkeypatch):
    """Every printed `loftq quantize`, given to the command line, arrives at the step's own configuration."""

    monkeypatch.setattr(loftq.pipeline, "quantize_checkpoint", capture)
    found = {json.dumps(s.arguments["config"]): s for name in list_recipes() for s in steps(name) if s.kind == QUANTIZE}
    # DeBERTa: NF2 and uniform at two ranks and NF4 at one with both methods, SVD first; BART: NF4 and uniform at two ranks
    # with both, NF2 with LoftQ alone; LLAMA: five widths with LoftQ, three of them with QLoRA
    assert len(found) == (2 * 2 + 1) * 2 + 1 + 2 * 2 * 2 + 2 + 5 + 3
    for step in found.values():
        program, *words = shlex.split(step.command)
        with pytest.raises(Captured) as given:
            app(words, standalone_mode=False)
        config = LoftQConfig.from_dict(step.arguments["config"])
        expected = *(step.arguments[name] for name in ("source", "revision", "out")), config
        assert (program, given.value.args) == ("loftq", expected), step.command


def test_quantize_command_of_unusual_settings(monkeypatch):
    monkeypatch.setattr(loftq.pipeline, "quantize_checkpoint", capture)
    changes = [
        "quantization.codebook=lloyd",
        "quantization.scale=search",
        "quantization.bits_pattern={down_proj: 4}",
        "quantization.target_modules=[q_proj, down_proj]",
        "quantization.double_quant=true",
        "quantization.lora_alpha=32",
        "quantization.calibration=null",
    ]
    recipe = load_recipe("gsm8k/llama2-7b-nf3-r64", changes)
    step = plan_steps(recipe, Options(Path("my out")))[0]
    with pytest.raises(Captured) as found:
        app(shlex.split(step.command)[1:], standalone_mode=False)
    assert found.value.args == (recipe.model, None, "my out/qlora/quantized", recipe.loftq_config("qlora"))


def test_other_commands():
    _, train, evaluate, *_ = steps("gsm8k/llama2-13b-nf4-r64", seeds=(3,))
    assert train.command == (
        "loftq train out/qlora/seed-3 --init-from out/qlora/quantized --task completion --data openai/gsm8k:main "
        "--split train --map question=prompt --map answer=completion --max-length 512 --prompt-template '{prompt}\n' "
        "--method qlora --epochs 6 --batch-size 16 --schedule cosine --warmup-ratio 0.03 --weight-decay 0.1 --metrics gsm8k "
        "--seed 3"
    )
    assert evaluate.command == (
        "loftq evaluate out/qlora/seed-3 --task completion --data openai/gsm8k:main --split test --map question=prompt "
        "--map answer=completion --max-length 512 --prompt-template '{prompt}\n' --metrics gsm8k --batch-size 16 "
        "--max-new-tokens 256 --num-beams 1 --predictions out/qlora/seed-3/predictions-test.jsonl"
    )
    lora = steps("glue/sst2-lora-r16")[0]
    assert "--method lora" in lora.command


class Trained(Exception):
    """Instead of training."""


def train_instead(out, settings, **options):
    raise Trained(str(out), settings, str(options["init_from"] or ""), options["model"], options["revision"])


@pytest.mark.parametrize("name", list_recipes("*/*-r*"))
def test_train_commands_mean_what_the_steps_do(name, monkeypatch):
    """Every printed `loftq train`, given to the command line, arrives at the step's own settings."""
    import loftq.finetune.run

    monkeypatch.setattr(loftq.finetune.run, "train", train_instead)
    for step in steps(name):
        if step.kind != TRAIN:
            continue
        with pytest.raises(Trained) as given:
            app(shlex.split(step.command)[1:], standalone_mode=False)
        expected = step.arguments
        settings = TrainSettings.from_dict(expected["settings"])
        assert given.value.args == (
            expected["out"],
            settings,
            expected["init_from"] or "",
            expected["model"],
            expected["revision"],
        )


class Measured(Exception):
    """Instead of measuring."""


@pytest.mark.parametrize("name", list_recipes("*/*-r*"))
def test_evaluate_commands_mean_what_the_steps_do(name, monkeypatch):
    import loftq.finetune.measure

    def measured(model, changes, metrics, **options):
        raise Measured(model, changes, metrics, options)

    monkeypatch.setattr(loftq.finetune.measure, "evaluate_task", measured)
    monkeypatch.setattr("loftq.checkpoint.writer.check_file", lambda *where: None)
    for step in steps(name):
        if step.kind != EVALUATE:
            continue
        with pytest.raises(Measured) as given:
            app(shlex.split(step.command)[1:], standalone_mode=False)
        model, changes, metrics, options = given.value.args
        expected = step.arguments
        assert (model, list(metrics)) == (expected["run"], expected["metrics"])
        assert DataSettings(**changes) == DataSettings.from_dict(expected["data"])
        assert {k: v for k, v in options.items() if k in expected["options"]} == expected["options"]


def test_the_lines_of_a_text_are_joined():
    found = steps("wikitext2/llama2-7b-nf2-r64", methods=("loftq",))
    assert [step.kind for step in found if "--join-rows" in step.command] == [TRAIN, EVALUATE]
    with pytest.raises(ConfigError, match="join_rows is 1, expected True or False"):
        load_recipe("wikitext2/llama2-7b-nf2-r64", ["data.join_rows=1"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("microsoft/deberta-v3-base", "refs/pr/4")),
        ({"revision": "v2"}, ("microsoft/deberta-v3-base", "v2")),
        ({"model": "microsoft/deberta-v3-base"}, ("microsoft/deberta-v3-base", "refs/pr/4")),
        ({"model": "my/model"}, ("my/model", None)),
        ({"model": "my/model", "revision": "v2"}, ("my/model", "v2")),
    ],
)
def test_the_revision_is_of_the_model_that_is_run(options, expected):
    quantized, trained = steps("glue/sst2-nf2-r16", methods=("loftq",), **options)[:2]
    assert (quantized.arguments["source"], quantized.arguments["revision"]) == expected
    assert trained.arguments["revision"] is None, "the quantized folder has none"
    plain = steps("glue/sst2-lora-r16", methods=("lora",), **options)[0]
    assert (plain.arguments["model"], plain.arguments["revision"]) == expected
    for step in (quantized, plain):
        assert ("--revision" in step.command) == (expected[1] is not None)


def test_every_recipe_of_deberta_names_its_revision():
    """Its main branch has pickled weights alone."""
    for name in list_recipes():
        recipe = load_recipe(name)
        assert recipe.revision == ("refs/pr/4" if recipe.model == "microsoft/deberta-v3-base" else None), name


def test_rouge_without_stems():
    recipe = load_recipe("xsum/bart-nf4-r8", ["training.rouge_stem=false"])
    _, train, evaluate, *_ = plan_steps(recipe, Options(Path("out")))
    assert train.arguments["settings"]["rouge_stem"] is evaluate.arguments["options"]["rouge_stem"] is False
    assert "--no-rouge-stem" in train.command
    assert "--no-rouge-stem" in evaluate.command
    with pytest.raises(ConfigError, match="rouge_stem is 'no', expected True or False"):
        load_recipe("xsum/bart-nf4-r8", ["training.rouge_stem='no'"])
