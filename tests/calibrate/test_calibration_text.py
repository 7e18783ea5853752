"""Windows of calibration tokens from every kind of text."""

from __future__ import annotations

import json
import sys
import types
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import loftq
from loftq.calibrate.text import CalibrationTokens, calibration_tokens
from loftq.evaluate.text import builtin_text
from tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


class Letters:
    """A tokenizer with one token a character."""

    pad_token_id = 0
    bos_token_id = 1
    eos_token_id = 2
    chat_template = None

    def __call__(self, text, **options):
        return types.SimpleNamespace(input_ids=[ord(c) for c in text])


def windows(name, samples=4, length=8, tokenizer=Letters(), **options) -> CalibrationTokens:  # noqa: B008
    return calibration_tokens(str(name), tokenizer, samples=samples, length=length, **options)


def text_of(tokens: CalibrationTokens) -> list[str]:
    return ["".join(chr(i) for i in row[m]) for row, m in zip(tokens.ids, tokens.mask, strict=True)]


def test_builtin_text_leaves_the_evaluation_its_part():
    text = builtin_text()
    with pytest.warns(UserWarning, match="1000000 were wanted"):
        every = windows("pydoc", samples=10**6, length=64)
    joined = "".join(text_of(every))
    assert text.startswith(joined)
    assert 0.54 * len(text) < len(joined) <= 0.55 * len(text)


def test_a_file_is_covered_evenly(tmp_path):
    path = tmp_path / "text.utf8"
    path.write_text("".join(f"{i:08}" for i in range(101)), encoding="utf-8")
    tokens = windows(path, samples=5)
    assert text_of(tokens) == [f"{i:08}" for i in (0, 25, 50, 75, 100)]
    assert tokens.ids.dtype == torch.int64
    assert tokens.mask.all()
    assert windows(path, samples=5).sha256 == tokens.sha256
    assert windows(path, samples=4).sha256 != tokens.sha256
    assert text_of(windows(path, samples=1)) == ["00000000"]


def test_fewer_windows_than_wanted(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij" * 2)
    with pytest.warns(UserWarning, match="gave 2 windows of 8 tokens, 4 were wanted"):
        assert text_of(windows(path)) == ["abcdefgh", "ijabcdef"]
    with pytest.warns(UserWarning, match="gave 1 window of 20 tokens"):
        assert text_of(windows(path, length=50)) == ["abcdefghij" * 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        windows(path, samples=2)


def test_json_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"text": "abcdefghijkl"},
        {"prompt": "question? ", "completion": "yes"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        {"text": "x"},
    ]
    path.write_text("\n".join(json.dumps(r) for r in rows[:3]) + "\n\n" + json.dumps(rows[3]))
    with pytest.warns(UserWarning, match="gave 3 windows"):
        tokens = windows(path)
    assert text_of(tokens) == ["abcdefgh", "question", "hi\nho"]
    assert tokens.ids.shape == (3, 8)
    assert not tokens.mask[2, 5:].any()


def test_stored_token_ids(stories_dir, tmp_path):
    path = stories_dir / "tokens.safetensors"
    stored = load_file(path)["train"]
    tokens = windows(f"{path}:train", samples=3, length=100, tokenizer=None)
    assert torch.equal(tokens.ids[0], stored[:100].long())
    assert tokens.ids.shape == (3, 100)
    save_file({"float": torch.zeros(9), "negative": -torch.ones(9, dtype=torch.int64)}, tmp_path / "t.safetensors")
    for key, message in {
        "nothing": "has no tensor 'nothing', expected one of",
        "float": r"is torch.float32 of shape \(9,\), expected token ids",
        "negative": "has the token id -1",
    }.items():
        with pytest.raises(loftq.SourceError, match=message):
            windows(f"{tmp_path / 't.safetensors'}:{key}")
    with pytest.raises(loftq.SourceError, match="does not exist"):
        windows(f"{tmp_path / 'u.safetensors'}:train")


def test_the_models_own_text(stories_dir):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(stories_dir, dtype=torch.float32)
    tokens = windows("self", samples=18, length=40, model=model, seed=1)
    assert tokens.ids.shape == (18, 40)
    assert (tokens.ids[:, 0] == 1).all()
    assert windows("self", samples=18, length=40, model=model, seed=1).sha256 == tokens.sha256
    assert windows("self", samples=18, length=40, model=model, seed=2).sha256 != tokens.sha256
    assert len({tuple(row.tolist()) for row in tokens.ids}) > 9
    # text of the model's own: it predicts it well, unlike random tokens (log 512 = 6.2)
    with torch.no_grad():
        loss = float(model(input_ids=tokens.ids, labels=tokens.ids).loss)
    assert loss < 3, f"{loss:.2f}"


def test_generation_stops_at_the_end_of_a_text():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # uniform: token 2 ends a window sooner or later
    tokens = windows("self", samples=20, length=60, model=model)
    ended = ~tokens.mask.all(1)
    assert ended.any()
    last = tokens.mask.sum(1) - 1
    assert (tokens.ids[torch.arange(len(last)), last][ended] == 2).all()
    assert not (tokens.ids[:, 1:] == 2)[tokens.mask[:, 1:]].sum() > ended.sum()


def test_mistakes(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "abcdef"}\n{"text": \n')
    with pytest.raises(loftq.SourceError, match=r"rows.jsonl, line 2 is no JSON"):
        windows(path)
    for line, message in {
        '{"txt": "a"}': "has the keys txt",
        "[1]": "has a list",
        '{"messages": [3]}': "without role",
    }.items():
        path.write_text(line)
        with pytest.raises(loftq.SourceError, match=message):
            windows(path)
    path.write_text('{"text": "a"}\n{"text": ""}\n')
    with pytest.raises(loftq.SourceError, match="no window of at least 2 tokens"):
        windows(path)
    path.write_text("")
    with pytest.raises(loftq.SourceError, match="no window of at least 2 tokens"):
        windows(path)
    short = tmp_path / "short.txt"
    short.write_text("a")
    with pytest.raises(loftq.SourceError, match="no window of at least 2 tokens"):
        windows(short)
    with pytest.raises(loftq.SourceError, match="no window of at least 2 tokens"):
        CalibrationTokens.of(torch.zeros(2, 5), torch.zeros(2, 5), "padding")
    short.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(loftq.SourceError, match="is not UTF-8"):
        windows(short)
    with pytest.raises(loftq.SourceError, match="does not exist"):
        windows(tmp_path / "nothing.jsonl")
    with pytest.raises(loftq.ConfigError, match="samples is 0"):
        windows("pydoc", samples=0)
    with pytest.raises(loftq.ConfigError, match="length is 1, expected an integer of at least 2"):
        windows("pydoc", length=1)
    with pytest.raises(loftq.ConfigError, match="generated by the model, but none was given"):
        windows("self")
    with pytest.raises(loftq.ConfigError, match="needs a tokenizer"):
        windows("pydoc", tokenizer=None)


def test_data_sets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(loftq.ConfigError, match="pip install datasets"):
        windows("nobody/nothing")
    asked = []

    def load_dataset(name, split, streaming, **options):
        asked.append((name, split))
        if name == "no/text":
            return iter([{"sentence": "a"}])
        if name == "no/where":
            raise ConnectionError("no network")
        return ({"text": "abcdefgh"} for _ in range(10**9))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert text_of(windows("some/text:valid"))[0] == "abcdefgh"
    windows("some/text")
    assert asked == [("some/text", "valid"), ("some/text", "train")]
    with pytest.raises(loftq.SourceError, match="has the columns sentence"):
        windows("no/text")
    with pytest.raises(loftq.SourceError, match=r"could not be read \(no network\)"):
        windows("no/where")
