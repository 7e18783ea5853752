"""``loftq data check``: what is learned is seen, as text and as JSON, and a mistake is one sentence."""

from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

from loftq.cli import app, main
from words import write_rows


def check(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["data", "check", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def sentences(tmp_path) -> str:
    return write_rows(
        tmp_path / "rows.jsonl", [{"question": "1+1=", "answer": "2"}, {"question": "2+3=", "answer": "5"}]
    )


def test_the_loss_mask_as_text(llama, sentences):
    """One token a byte: <s> and the prompt before the brackets, the completion and the end of text in them."""
    lines = check(llama, "--task", "completion", "--data", sentences).splitlines()
    assert f"{sentences}, line 1" in lines
    assert "<s>·1·+·1·=⟦2·</s>⟧" in lines
    assert "<s>·2·+·3·=⟦5·</s>⟧" in lines
    counts = dict(line.strip().rsplit(maxsplit=1) for line in lines if len(line.split()) > 1)
    assert {name: counts[name] for name in ("rows", "tokens", "predicted tokens", "cut")} == {
        "rows": "2",
        "tokens": "14",  # 2 rows of <s>, 4 bytes, 1 byte, </s>
        "predicted tokens": "4",
        "cut": "0",
    }


def test_the_loss_mask_as_json(llama, sentences):
    found = json.loads(check(llama, "--task", "completion", "--data", sentences, "--show", 1, "--json"))
    (shown,) = found["shown"]
    assert [(text, learned) for _, text, learned in shown["tokens"]] == [
        *(("<s>", False), ("1", False), ("+", False), ("1", False), ("=", False)),
        *(("2", True), ("</s>", True)),
    ]
    assert shown["tokens"][0][0] == 1
    assert shown["where"] == f"{sentences}, line 1"
    assert (found["rows"], found["predicted_tokens"], found["notes"]) == (2, 4, [])


def test_what_a_limit_cuts_is_said(llama, tmp_path):
    rows = [{"prompt": "1", "completion": "2345678"}, {"prompt": "1234567890", "completion": "2"}]
    text = check(llama, "--task", "completion", "--data", write_rows(tmp_path / "long.jsonl", rows), "--max-length", 6)
    assert "<s>·1⟦2·3·4·5⟧" in text.splitlines()
    together = " ".join(text.split())
    assert f"1 of 2 rows are longer than 6 tokens and were cut, first {tmp_path / 'long.jsonl'}, line 1" in together
    assert "1 of 2 rows have nothing to predict within 6 tokens and were left out" in together


def test_turns_of_the_assistant(llama, tmp_path):
    roles = ("system", "user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": str(i)} for i, role in enumerate(roles)]
    found = json.loads(
        check(
            llama, "--task", "chat", "--data", write_rows(tmp_path / "chat.jsonl", [{"messages": messages}]), "--json"
        )
    )
    learned = "".join(text for _, text, mark in found["shown"][0]["tokens"] if mark)
    assert learned == "2<|im_end|>4<|im_end|>"


def test_classes_and_pairs(bert, tmp_path):
    table = tmp_path / "pairs.csv"
    table.write_text("premise,hypothesis,label\nab,b,yes\nab,c,no\nbc,c,yes\n", encoding="utf-8")
    options = (bert, "--task", "classification", "--data", table)
    found = json.loads(check(*options, "--json"))
    assert found["labels"] == {"no": 1, "yes": 2}
    assert [shown["label"] for shown in found["shown"]] == ["yes", "no", "yes"]
    assert "".join(text for _, text, _ in found["shown"][0]["tokens"]) == "<s>ab<sep>b<sep>"
    lines = [line.split() for line in check(*options).splitlines()]
    assert ["→", "no"] in lines
    assert ["yes", "2", "66.7"] in lines


# name of the file, its text, options -> what the message says; {file} is its path
MISTAKES = {
    "task": (
        "a.jsonl",
        '{"text": "a"}',
        ["--task", "clasification"],
        "task is 'clasification', expected one of causal, completion,",
    ),
    "role": (
        "a.jsonl",
        '{"a": "a"}',
        ["--task", "completion", "--map", "a=answer"],
        "column 'a' is mapped to 'answer', expected",
    ),
    "map": ("a.jsonl", '{"a": "a"}', ["--task", "completion", "--map", "a"], "--map is 'a', expected COLUMN=ROLE"),
    "mapped column": (
        "a.jsonl",
        '{"a": "a"}',
        ["--task", "causal", "--map", "b=text"],
        "{file}, line 1 has no column 'b', it has a",
    ),
    "missing column": (
        "a.jsonl",
        '{"question": "a"}',
        ["--task", "completion"],
        "{file}, line 1 has the columns question, but none is known as completion of the task completion; say which with --map",
    ),
    "empty": ("a.jsonl", "", ["--task", "causal"], "{file} has no rows, expected at least one"),
    "empty csv": ("a.csv", "text\n", ["--task", "causal"], "{file} has no rows, expected at least one"),
    "broken": (
        "a.jsonl",
        '{"text": "a"}\n{"text": "b"\n{"text": "c"}\n',
        ["--task", "causal"],
        "{file}, line 2 is no JSON (",
    ),
    "short line": (
        "a.csv",
        "prompt,completion\na,b\nc\n",
        ["--task", "completion"],
        "{file}, line 3 has 1 columns, expected 2",
    ),
    "positions": (
        "a.jsonl",
        '{"text": "a"}',
        ["--task", "causal", "--max-length", "129"],
        "max_length is 129, but the model has 128 positions; lower it to at most 128",
    ),
    "template": (
        "a.jsonl",
        '{"prompt": "a", "completion": "b"}',
        ["--task", "completion", "--prompt-template", "x"],
        "'x' has no {{prompt}}",
    ),
    "one class": (
        "a.csv",
        "text,label\na,b\nc,b\n",
        ["--task", "classification"],
        "have the label 'b', expected at least two",
    ),
}


@pytest.mark.parametrize(("name", "text", "options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(llama, tmp_path, monkeypatch, capsys, name, text, options, message):
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["loftq", "data", "check", str(llama), "--data", str(file), *options])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err.startswith("loftq: ")
    assert message.format(file=file) in captured.err
    assert captured.err.count("\n") == 1, captured.err
    assert captured.out == ""
