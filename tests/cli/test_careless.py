"""What a careless user gives `train`, `data check`, `evaluate` and `reproduce`: one sentence each, and no run left behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from loftq.cli import main
from loftq.finetune.trainer import TaskTrainer

ROWS = '{"prompt": "1+1=", "completion": "2"}\n{"prompt": "1+2=", "completion": "3"}\n'
CLASSES = "text,label\na,yes\nb,no\nc,yes\n"
SQUAD = '{"data": [{"paragraphs": [{"context": "a b", "qas": [{"id": "1", "question": "q", "answers": []}]}]}]}'


@pytest.fixture
def said(monkeypatch, capsys, tmp_path):
    """Exit code and what stands on stderr of a command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["loftq", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, capsys.readouterr().err

    return run


def write(files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


LABELS = ["--task", "classification", "--data", "a.csv"]
PAIRS = ["--task", "completion", "--data", "a.jsonl"]
TEXTS = ["--task", "causal", "--data", "a.jsonl"]
QUESTIONS = ["--task", "qa", "--data", "a.json"]
# folder, files, options -> the sentence
DATA = {
    "types": (
        "llama",
        {"a.jsonl": '{"text": "a"}\n{"text": 5}\n'},
        TEXTS,
        "a.jsonl, line 2: text is 5, expected a text",
    ),
    "zeros": ("llama", {"a.jsonl": b'{"text": "a"}\n\x00\x00\n'}, TEXTS, "a.jsonl, line 2 is no JSON"),
    "utf-16": ("bert", {"a.csv": CLASSES.encode("utf-16")}, LABELS, "a.csv, line 1 is not UTF-8"),
    "no rows": ("bert", {"a.csv": "text,label\n"}, LABELS, "a.csv has no rows, expected at least one"),
    "one row": ("bert", {"a.csv": CLASSES}, [*LABELS, "--limit", 1], "expected at least two classes"),
    "folder": ("llama", {"a.jsonl/notes": ""}, TEXTS, "a.jsonl has no file for the split 'train'"),
    "long number": (
        "bert",
        {"a.csv": f"text,label\na,{'9' * 5000}\nb,1\n"},
        LABELS,
        "is a name, but '1' (a.csv, line 3)",
    ),
    "other classes": (
        "bert",
        {"a.csv": CLASSES},
        [*LABELS, "--labels", "good,bad"],
        "a.csv, line 2 has the label 'yes', expected one of --labels: good, bad",
    ),
    "no answer": ("bert", {"a.json": SQUAD}, QUESTIONS, "answers has no answer, expected one inside the context"),
    "no paragraphs": (
        "bert",
        {"a.json": '{"data": [{"paragraphs": null}]}'},
        QUESTIONS,
        "a.json, line 1 does not follow SQuAD's format; repair or remove it",
    ),
}
TRAINING = {
    "rate": (["--lr", "-1"], "learning_rate is -1.0, expected a positive number"),
    "seed": (["--seed", 2**33], "seed is 8589934592, expected less than 4294967296"),
    "metrics": (["--eval-data", "b.jsonl", "--metrics", ","], "--metrics is ',', which names nothing"),
    "length": (["--max-length", 10**30], "but the model has 128 positions; lower it to at most 128"),
    "texts": (
        ["--eval-data", "b.jsonl", "--metrics", "exact_match", "--max-new-tokens", 4000],
        "and max_new_tokens is 4000, but the model has 128 positions",
    ),
    "file": (["--model", "a.jsonl", "--method", "full"], "a.jsonl is a file, expected a model's folder or a hub id"),
}


@pytest.mark.parametrize(("folder", "files", "options", "sentence"), DATA.values(), ids=DATA)
def test_data(request, said, folder, files, options, sentence):
    write(files)
    model = request.getfixturevalue(folder)
    for command in (["train", "run", "--init-from", model], ["data", "check", model]):
        code, text = said(*command, *options)
        assert (code, text.count("\n")) == (2, 1), text
        assert text.startswith("loftq: ")
        assert sentence in text
    assert not Path("run").exists()


@pytest.mark.parametrize(("options", "sentence"), TRAINING.values(), ids=TRAINING)
def test_settings(llama, said, options, sentence):
    write({"a.jsonl": ROWS, "b.jsonl": ROWS})
    code, text = said("train", "run", "--init-from", llama, *PAIRS, *options)
    *before, last = text.splitlines()
    assert code == 2
    assert all(line.startswith("loftq: measuring: 0 of ") for line in before), text
    assert sentence in last
    assert not Path("run").exists()


def test_target_modules_that_are_no_expression(llama, said):
    write({"a.jsonl": ROWS})
    where = ["--model", llama.parent / "source", "--method", "lora", "--target-modules", "("]
    code, text = said("train", "run", *where, *PAIRS)
    assert code == 2
    assert "PEFT cannot add this adapter (missing )" in text


FOLDERS = {
    "a file": ("taken", "taken is a file, expected a folder; choose another name"),
    "below a file": ("taken/run", "taken is a file, expected a folder; choose another name"),
    "too long": ("r" * 300, "File name too long"),
    "the current one": (".", ". holds something else, expected a folder that is absent, empty or a run to continue"),
    "the adapter of a quantized folder": ("q/loftq_init", "q/loftq_init holds something else"),
    "another quantized folder": ("q", "q holds something else"),
}


@pytest.mark.parametrize(("out", "sentence"), FOLDERS.values(), ids=FOLDERS)
def test_folders(llama, said, out, sentence):
    import shutil

    write({"a.jsonl": ROWS, "taken": "x"})
    shutil.copytree(llama, "q")
    before = sorted(str(p) for p in Path().rglob("*"))
    code, text = said("train", out, "--init-from", llama, *PAIRS)
    assert (code, text.count("\n")) == (2, 1), text
    assert sentence in text
    assert sorted(str(p) for p in Path().rglob("*") if p.name != ".lock") == before


def test_files_of_other_systems_are_read(bert, said):
    """A byte order mark, and lines that end in CR LF or in CR."""
    for number, end in enumerate((b"\r\n", b"\r")):
        write({"a.csv": b"\xef\xbb\xbf" + CLASSES.encode().replace(b"\n", end)})
        code, text = said("train", f"run{number}", "--init-from", bert, *LABELS, "--max-steps", 1, "--json")
        assert code == 0, text


def test_an_interrupt_is_one_sentence_and_the_run_continues(llama, said, monkeypatch):
    write({"a.jsonl": ROWS})
    command = ["train", "run", "--init-from", llama, *PAIRS, "--batch-size", 1, "--max-steps", 4, "--eval-steps", 1]
    step = TaskTrainer.training_step

    def interrupted(trainer, *arguments, **options):
        if trainer.state.global_step == 2:
            raise KeyboardInterrupt
        return step(trainer, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(TaskTrainer, "training_step", interrupted)
        code, text = said(*command)
    lines = ["training (loftq): 0 of 4 steps", "interrupted; unfinished work continues when the command is run again"]
    assert (code, text.splitlines()) == (130, [f"loftq: {line}" for line in lines])
    code, text = said(*command)
    lines = ["continuing from step 2 of 4", "training (loftq): 2 of 4 steps", "training (loftq): 4 of 4 steps in "]
    assert code == 0
    for line, expected in zip(text.splitlines(), lines, strict=True):
        assert line.startswith(f"loftq: {expected}")
    record = json.loads(Path("run/training.json").read_text())
    assert [c["step"] for c in record["curve"]] == [1, 2, 3, 4]


PREDICTIONS = {
    "below a file": ("taken/answers.jsonl", "taken is a file, expected a folder; choose another name"),
    "a folder": ("folder", "folder is a folder, expected a file for the predictions"),
}


@pytest.mark.parametrize(("file", "sentence"), PREDICTIONS.values(), ids=PREDICTIONS)
def test_predictions_are_refused_before_the_model_is_measured(llama, said, monkeypatch, file, sentence):
    write({"a.jsonl": ROWS, "taken": "x", "folder/x": "x"})
    monkeypatch.setattr("loftq.finetune.measure.measure", lambda *arguments, **options: pytest.fail("measured"))
    code, text = said("evaluate", llama, *PAIRS, "--metrics", "exact_match", "--predictions", file)
    assert code == 2
    assert sentence in text


EVALUATIONS = {
    "dtype": (["--dtype", "int4"], "dtype is 'int4', expected one of auto, float32, bfloat16, float16"),
    "metrics": (["--metrics", ""], "--metrics is '', which names nothing"),
    "limit": (["--limit", "-1"], "limit is -1, expected an integer of at least 1"),
}


@pytest.mark.parametrize(("options", "sentence"), EVALUATIONS.values(), ids=EVALUATIONS)
def test_evaluations(llama, said, options, sentence):
    write({"a.jsonl": ROWS})
    code, text = said("evaluate", llama, *PAIRS, *options)
    assert (code, text.count("\n")) == (2, 1), text
    assert sentence in text
