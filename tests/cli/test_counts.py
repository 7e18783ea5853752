"""Options that were given where they do not count are refused in one sentence, and leave nothing behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import typer.main

from loftq.cli import app, main
from loftq.cli.counts import COUNTS

ROWS = '{"prompt": "1+1=", "completion": "2"}\n{"prompt": "1+2=", "completion": "3"}\n'
PAIRS = ["--task", "completion", "--data", "a.jsonl"]
CLASSES = ["--task", "classification", "--data", "a.csv"]
FILE = "is a single file without splits"
LORA = "is for lora without a quantized folder"


@pytest.fixture
def said(monkeypatch, capsys, tmp_path):
    """Exit code, stdout and stderr of a command in a folder with some data."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(ROWS)
    Path("a.csv").write_text("text,label\na,x\nb,y\nc,z\n")
    Path("a.txt").write_text("some text to measure")

    def run(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["loftq", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, *capsys.readouterr()

    return run


TRAIN = ["train", "run", "--init-from", "{llama}", *PAIRS]
BARE = ["train", "run", "--model", "{source}", *PAIRS]
TEXT = ["evaluate", "{llama}"]
TASK = ["evaluate", "{llama}", *PAIRS]
CHECK = ["data", "check", "{llama}"]
ABLATE = ["ablate", "{source}", "--out", "run"]
STRAYS = [
    *((TRAIN, option, LORA) for option in ("--rank 4", "--lora-alpha 4", "--target-modules q_proj", "--use-rslora")),
    *((BARE, f"--method full {option}", LORA) for option in ("--rank 4", "--target-modules q_proj")),
    (BARE, "--method full --lora-dropout 0.1", "is for methods with an adapter"),
    (TRAIN, "--eval-limit 3", "is for evaluation data (--eval-data or --eval-split)"),
    *(
        (TASK, option, sentence)
        for option, sentence in (
            ("--max-new-tokens 3", "is for metrics of written texts"),
            ("--num-beams 2", "is for metrics of written texts"),
            ("--no-rouge-stem", "--no-rouge-stem is for ROUGE"),
            ("--metrics exact_match --no-rouge-stem", "--no-rouge-stem is for ROUGE"),
            ("--metrics nonsense --num-beams 2", "metric is 'nonsense'"),
        )
    ),
    (TASK, "--predictions p.jsonl", "is for metrics of predictions, which perplexity and loss are not"),
    (TRAIN, "--doc-stride 3", "is for the task qa"),
    (TRAIN, "--max-target-length 9", "is for the task summarization"),
    (
        ["train", "run", "--init-from", "{llama}", *CLASSES],
        "--prompt-template Q:{{prompt}}",
        "is for the task completion or the task summarization",
    ),
    (TRAIN, "--split bogus", FILE),
    (TRAIN, "--eval-split validation", FILE),
    (TRAIN, "--eval-data a.jsonl --eval-split validation", FILE),
    ([*CHECK, *PAIRS], "--split validation", FILE),
    ([*CHECK, *PAIRS], "--show -1", "show is -1, expected an integer of at least 0"),
    (
        [*CHECK, "--task", "chat", "--data", "a.jsonl"],
        "--prompt-template Q:{{prompt}}",
        "is for the task completion or the task summarization",
    ),
    *(
        (TEXT, option, "is for the data of a task")
        for option in (
            "--metrics perplexity",
            "--labels a,b",
            "--map a=text",
            "--num-beams 2",
            "--max-new-tokens 2",
            "--split test",
            "--max-length 9",
            "--limit 1",
            "--predictions p.jsonl",
        )
    ),
    (TEXT, "--doc-stride 3", "is for the task qa"),
    (TEXT, "--prompt-template Q:{{prompt}}", "is for the task completion"),
    (TEXT, "--num-fewshot 2", "is for --lm-eval"),
    *((TASK, option, "is for a text") for option in ("--window 9", "--stride 9", "--max-tokens 9", "--no-adapter")),
    *((TASK, option, "is for --lm-eval") for option in ("--num-fewshot 2", "--include-path a")),
    (TASK, "--split bogus", FILE),
    *(
        (ABLATE, option, "is for fine-tuning, which needs --task, --data and --eval-data")
        for option in ("--epochs 7", "--batch-size 3", "--lr 5", "--split foo")
    ),
    *((ABLATE, option, "is for a text (--text)") for option in ("--window 7", "--max-tokens 77")),
    ([*ABLATE, *PAIRS], "--eval-split validation", FILE),
    (["reproduce", "--list"], "--set foo=1", "--set is for a recipe that is run rather than listed"),
]


@pytest.mark.parametrize(("command", "options", "sentence"), STRAYS, ids=[f"{c[0]} {o}" for c, o, _ in STRAYS])
def test_strays(llama, said, command, options, sentence):
    places = {"llama": llama, "source": llama.parent / "source"}
    words = [word.format(**places) for word in command]
    code, _, text = said(*words, *options.format(**places).split())
    assert (code, text.count("\n")) == (2, 1), text
    assert sentence in text
    assert not Path("run").exists()


def test_every_option_of_the_table_exists():
    group = typer.main.get_command(app)
    verbs = {**group.commands, **group.commands["data"].commands}
    for verb, options in COUNTS.items():
        assert set(options) <= {parameter.name for parameter in verbs[verb].params}


def test_trained_and_measured_on_the_same_rows(llama, said):
    measured = ["--eval-data", Path("a.jsonl").absolute(), "--max-steps", 1, "--json"]
    code, out, text = said("train", "run", "--init-from", llama, *PAIRS, *measured)
    assert code == 0, text
    record = json.loads(out)
    assert "is both trained and measured on" in record["notes"][-1]
    assert record["notes"][-1] in text
    assert {"accelerate", "tokenizers"} <= set(record["versions"])


def test_a_run_without_evaluation_data_is_measured_on_the_validation_split(llama, said):
    for split, rows in (("train", ROWS), ("validation", ROWS.splitlines()[1])):
        Path("d", f"{split}.jsonl").parent.mkdir(exist_ok=True)
        Path("d", f"{split}.jsonl").write_text(rows)
    folder = ["--task", "completion", "--data", "d"]
    assert said("train", "run", "--init-from", llama, *folder, "--max-steps", 1)[0] == 0
    options = ["--metrics", "exact_match", "--max-new-tokens", 1, "--json", "--predictions", "p.jsonl"]
    for split, where in (((), "d/validation.jsonl, line 1"), (("--split", "train"), "d/train.jsonl, line 1")):
        code, out, text = said("evaluate", "run", "--data", "d", *split, *options)
        assert code == 0, text
        assert json.loads(out)["data"]["split"] == (split or ("", "validation"))[1]
        assert json.loads(Path("p.jsonl").read_text().splitlines()[0])["id"] == where
        assert ("d is both trained and measured on" in text) == bool(split)


def test_labels_of_a_run(llama, said):
    code, _, text = said("train", "run", "--init-from", llama, *CLASSES, "--max-steps", 1)
    assert code == 0, text
    code, _, text = said("evaluate", "run", "--data", "a.csv", "--labels", "p,q,r")
    assert (code, text.count("\n")) == (2, 1), text
    assert "labels is p, q, r, but the run was trained for the classes x, y, z in this order" in text
    code, _, text = said("evaluate", "run", "--data", "a.csv", "--labels", "x,y,z")
    assert code == 0, text


def test_rslora_without_a_quantized_folder(llama, said):
    new = ["--method", "lora", "--model", llama.parent / "source", "--rank", 4, "--use-rslora", "--max-steps", 1]
    code, _, text = said("train", "run", *new, *PAIRS)
    assert code == 0, text
    config = json.loads(Path("run/adapter_config.json").read_text())
    assert (config["use_rslora"], config["r"]) == (True, 4)


def test_documents_that_are_trained_apart_are_measured_apart(llama, said):
    Path("texts.jsonl").write_text("".join(f'{{"text": "{c * 9}"}}\n' for c in "abc"))
    texts = ["--task", "causal", "--data", "texts.jsonl", "--eval-data", "texts.jsonl", "--no-packing", "--json"]
    code, out, text = said("train", "run", "--init-from", llama, *texts, "--max-steps", 1)
    assert code == 0, text
    assert json.loads(out)["eval_data"]["examples"] == 3
