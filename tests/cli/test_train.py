"""``loftq train`` and ``loftq evaluate RUN``, end to end, and a mistake in one sentence that leaves no folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loftq.cli import app, main
from loftq.finetune.record import TrainingRecord
from words import write_rows


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def trained(llama, sums, tmp_path_factory) -> tuple[Path, dict]:
    """A run on sums, and what it printed as JSON."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    options = ["--epochs", 6, "--batch-size", 12, "--lr", "5e-3", "--json"]
    text = invoke(
        *("train", folder, "--init-from", llama, "--task", "completion", "--data", sums, "--eval-data", sums), *options
    )
    return folder, json.loads(text)


def test_a_run_end_to_end(trained, llama, sums):
    folder, record = trained
    print(record["before"], record["after"])
    assert record["status"] == "finished"
    assert record["after"]["perplexity"] < 0.7 * record["before"]["perplexity"]
    # of 36 rows the sum and the end of text; only 5+5 has a sum of two digits
    assert (len(record["curve"]), record["data"]["rows"], record["data"]["predicted_tokens"]) == (18, 36, 73)
    assert record["settings"]["data"]["data"] == sums
    assert (record["base"], record["settings"]["learning_rate"]) == (str(llama), 5e-3)
    assert record == TrainingRecord.load(folder).to_dict()
    assert {"adapter_model.safetensors", "adapter_config.json", "training.json"} <= {p.name for p in folder.iterdir()}


def test_the_same_command_prints_the_finished_run(trained, llama, sums):
    folder, record = trained
    where = ["train", folder, "--init-from", llama, "--task", "completion", "--data", sums, "--eval-data", sums]
    written = (folder / "training.json").stat().st_mtime_ns
    text = invoke(*where, "--epochs", 6, "--batch-size", 12, "--lr", "5e-3")
    assert (folder / "training.json").stat().st_mtime_ns == written
    assert "finished: step " in text
    assert f"{record['trainable']:,} of" in text
    row = next(line for line in text.splitlines() if line.strip().startswith("perplexity"))
    _, before, _, _, after, _, _ = row.split()
    assert (float(before), float(after)) == pytest.approx(
        [record[w]["perplexity"] for w in ("before", "after")], abs=0.06
    )


def test_evaluate(trained):
    folder, record = trained
    found = json.loads(invoke("evaluate", folder, "--json", "--batch-size", 12))
    assert found["metrics"]["perplexity"] == pytest.approx(record["after"]["perplexity"], rel=1e-5)
    text = invoke("evaluate", folder, "--limit", 4)
    assert text.split()[:2] == ["metric", "value"]
    assert " ± " in text


def test_evaluate_on_other_data_with_other_metrics(trained, tmp_path):
    folder, _ = trained
    other = write_rows(tmp_path / "other.jsonl", [{"q": "1+1=", "a": "2"}, {"q": "2+2=", "a": "4"}])
    written = tmp_path / "answers.jsonl"
    options = ["--data", other, "--map", "q=prompt,a=completion", "--metrics", "exact_match,loss"]
    found = json.loads(invoke("evaluate", folder, *options, "--max-new-tokens", 3, "--predictions", written, "--json"))
    rows = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]
    assert [(row["input"], row["reference"]) for row in rows] == [("1+1=", "2"), ("2+2=", "4")]
    right = [row["prediction"].strip() == row["reference"] for row in rows]
    assert [row["score"] for row in rows] == right
    assert found["metrics"]["exact_match"] == 100 * sum(right) / 2
    assert set(found["metrics"]) >= {"exact_match", "loss", "loss_se"}


def test_a_run_continues_a_prompt(trained, llama, mistake):
    folder, _ = trained
    of_run = invoke("generate", folder, "-p", "1+1=", "--max-new-tokens", 3)
    assert of_run == invoke("generate", llama, "--adapter", folder, "-p", "1+1=", "--max-new-tokens", 3)
    message = mistake("generate", folder, "--no-adapter", "-p", "1+1=")
    assert "is a run of `loftq train` with its own adapter; name its quantized folder instead" in message


def test_a_quantized_folder_is_no_classifier(bert, letters_a_or_b, mistake):
    message = mistake("evaluate", bert, "--task", "classification", "--data", letters_a_or_b)
    assert "without a trained head for classification; train one with" in message


@pytest.mark.parametrize("folder", ["llama", "bert"])
def test_a_classifier_writes_no_text(folder, letters_a_or_b, mistake, tmp_path, request):
    start, run = request.getfixturevalue(folder), tmp_path / "run"
    where = ["--init-from", start, "--task", "classification", "--data", letters_a_or_b, "--max-steps", 1]
    invoke("train", run, *where)
    saved = json.loads((run / "adapter_config.json").read_text())["modules_to_save"]
    assert sorted(saved) == ["classifier", "score"]
    for command in (["generate", run, "-p", "a"], ["evaluate", run, "--text", "pydoc"]):
        message = mistake(*command)
        assert f"{run} is a " in message
        assert "ForSequenceClassification, expected a causal language model for this" in message


@pytest.fixture
def mistake(monkeypatch, capsys, tmp_path):
    """The one sentence of a command that must fail with exit code 2, run in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["loftq", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        assert stop.value.code == 2
        assert captured.err.startswith("loftq: ")
        assert captured.err.count("\n") == 1, captured.err
        assert captured.out == ""
        return captured.err

    return run


CLASSES = "text,label\na,yes\nb,no\nc,yes\n"
# files, options -> what the message says
MISTAKES = {
    "task": (
        {},
        ["--task", "complete", "--data", "a.jsonl"],
        "task is 'complete', expected one of causal, completion, chat, classification, regression, qa, summarization; did",
    ),
    "role": (
        {"a.jsonl": '{"a": "b"}'},
        ["--task", "causal", "--data", "a.jsonl", "--map", "a=txt"],
        "column 'a' is mapped to 'txt', expected one of text for the task causal",
    ),
    "column": (
        {"a.csv": "prompt,reply\na,b\n"},
        ["--task", "completion", "--data", "a.csv"],
        "a.csv, line 2 has the columns prompt, reply, but none is known as completion of the task completion; say which with "
        "--map COLUMN=completion",
    ),
    "no file": ({}, ["--task", "causal", "--data", "b.jsonl"], "data 'b.jsonl' does not exist"),
    "empty": ({"a.jsonl": "\n"}, ["--task", "causal", "--data", "a.jsonl"], "a.jsonl has no rows"),
    "label": (
        {"a.csv": CLASSES, "b.csv": "text,label\na,yes\nb,maybe\n"},
        ["--task", "classification", "--data", "a.csv", "--eval-data", "b.csv"],
        "b.csv, line 3 has the label 'maybe', expected one of the training data: no, yes; correct or remove it",
    ),
    "broken": (
        {"a.jsonl": '{"text": "a"}\n{"text": "b"}\n{"text": c}\n{"text": "d"}\n'},
        ["--task", "causal", "--data", "a.jsonl"],
        "a.jsonl, line 3 is no JSON (",
    ),
    "length": (
        {"a.jsonl": '{"text": "a"}'},
        ["--task", "causal", "--data", "a.jsonl", "--max-length", "4096"],
        "max_length is 4096, but the model has 128 positions; lower it to at most 128",
    ),
    "metric": (
        {"a.csv": CLASSES},
        ["--task", "classification", "--data", "a.csv", "--eval-data", "a.csv", "--metrics", "acuracy"],
        "metric is 'acuracy', expected one of accuracy, f1, f1_macro, matthews; did you mean accuracy?",
    ),
    "method": (
        {},
        ["--task", "causal", "--data", "a.jsonl", "--method", "lofq"],
        "method is 'lofq', expected one of loftq, qlora, lora, full; did",
    ),
    "patience": ({}, ["--task", "causal", "--data", "a.jsonl", "--patience", "2"], "there is nothing to measure on"),
    "split": (
        {"d/train.jsonl": '{"text": "a"}'},
        ["--task", "causal", "--data", "d", "--eval-split", "validation"],
        "d has no file for the split 'validation'",
    ),
}


@pytest.mark.parametrize(("files", "options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(llama, mistake, files, options, message):
    for name, text in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")
    assert message in mistake("train", "run", "--init-from", llama, *options)
    assert not Path("run").exists()


def test_methods_without_their_model(mistake, llama):
    options = ["--task", "causal", "--data", "a.jsonl"]
    assert "the method lora trains a full-precision model, expected one with --model" in mistake(
        "train", "run", "--method", "lora", *options
    )
    assert "the method loftq trains a quantized folder, expected one with --init-from" in mistake(
        "train", "run", *options
    )
    assert "is quantized, but the method full trains a full-precision model" in mistake(
        "train", "run", "--method", "full", "--model", llama, *options
    )
    assert not Path("run").exists()


def test_the_corrected_command_may_have_the_folder(mistake, llama, tmp_path):
    """A mistake in the settings is no run that a second command would have to continue."""
    data = write_rows(tmp_path / "rows.jsonl", [{"q": "1+1=", "a": "2"}] * 4)
    command = ["train", "run", "--init-from", llama, "--task", "completion", "--data", data, "--max-steps", 1]
    assert "--map COLUMN=prompt" in mistake(*command)
    Path("run").mkdir()  # the user's own, and still empty after a mistake
    assert "--map COLUMN=completion" in mistake(*command, "--map", "q=prompt")
    record = json.loads(invoke(*command, "--map", "q=prompt,a=completion", "--json"))
    assert (record["status"], len(record["curve"]), record["after"]) == ("finished", 1, None)


def test_a_mistake_with_no_resume_leaves_the_earlier_run(mistake, trained, llama, sums):
    folder, record = trained
    where = ["train", folder, "--init-from", llama, "--task", "completion"]
    assert "holds a run with other settings" in mistake(*where, "--data", sums)
    assert "does not exist" in mistake(*where, "--data", "nowhere.jsonl", "--no-resume")
    assert TrainingRecord.load(folder).to_dict() == record


def test_evaluating_a_run_wrongly(mistake, trained):
    folder, _ = trained
    assert "metric is 'accuracy', expected one of perplexity" in mistake("evaluate", folder, "--metrics", "accuracy")
    assert "the run was trained for completion" in mistake("evaluate", folder, "--task", "qa", "--data", "a.json")
    assert "--text and --task or --data were given together" in mistake(
        "evaluate", folder, "--text", "pydoc", "--data", "a.jsonl"
    )
    assert "--no-adapter is for a text or --lm-eval" in mistake("evaluate", folder, "--no-adapter")


def test_a_run_is_evaluated_as_it_was_measured(llama, sums, tmp_path, monkeypatch):
    """Length of texts, beams, batch and dtype are the run's own, unless the command says otherwise."""
    import loftq.finetune.measure as module

    where = ["--init-from", llama, "--task", "completion", "--data", sums, "--eval-data", sums, "--eval-limit", 4]
    own = ["--metrics", "exact_match", "--max-new-tokens", 3, "--num-beams", 2, "--eval-batch-size", 4]
    invoke("train", tmp_path / "run", *where, *own, "--max-steps", 1, "--dtype", "bfloat16")
    seen: dict = {}
    real = module.measure

    def spy(model, *arguments, **options):
        seen.update(options, dtypes={str(p.dtype) for p in model.parameters()})
        return real(model, *arguments, **options)

    monkeypatch.setattr(module, "measure", spy)
    names = ("max_new_tokens", "num_beams", "batch_size")
    invoke("evaluate", tmp_path / "run")
    assert [seen[n] for n in names] == [3, 2, 4]
    assert "torch.bfloat16" in seen["dtypes"]
    invoke(
        "evaluate", tmp_path / "run", "--max-new-tokens", 2, "--num-beams", 1, "--batch-size", 2, "--dtype", "float32"
    )
    assert [seen[n] for n in names] == [2, 1, 2]
    assert seen["dtypes"] == {"torch.float32"}


@pytest.mark.parametrize("option", ["max-new-tokens", "num-beams", "batch-size"])
def test_no_number_of_texts_or_tokens(trained, mistake, option):
    folder, _ = trained
    message = f"{option.replace('-', '_')} is 0, expected an integer of at least 1"
    assert message in mistake("evaluate", folder, "--metrics", "exact_match", f"--{option}", 0)
