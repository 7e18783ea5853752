"""Recipes of the paper for SQuAD, ANLI and XSum on real small models and the first rows of real samples, every step real."""

from __future__ import annotations

import json

import pytest
import transformers as tf
from typer.testing import CliRunner

from loftq.cli import app
from loftq.evaluate.rouge import conditions
from loftq.finetune.record import TrainingRecord

pytestmark = pytest.mark.slow  # half a minute each


def reproduce(name: str, out, *options: object) -> list[dict]:
    """The measured lines of ``loftq reproduce``, of the method loftq and one epoch."""
    given = ["--methods", "loftq", "--set", "training.epochs=1", "--limit", 6, "--out", out, "--json", *options]
    done = CliRunner().invoke(app, ["reproduce", name, *map(str, given)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return [line for line in json.loads(done.stdout)["results"] if line["method"] == "loftq"]


@pytest.fixture(scope="module")
def samples(stories_dir):
    return stories_dir.parent


@pytest.mark.parametrize("name", ["squad/nf2-r16", "squad/uniform2-r32"])
def test_squad(samples, minilm_dir, tmp_path, name):
    lines = reproduce(
        name,
        tmp_path / "out",
        "--model",
        minilm_dir,
        "--local",
        samples / "squad",
        "--file",
        "validation=dev_xquad_en.json",
    )
    print(lines)
    assert {line["metric"] for line in lines} == {"exact_match", "f1"}
    assert all(0 <= line["measured"] <= 100 for line in lines)


def test_anli_in_its_own_files(minilm_dir, tmp_path):
    """Their premise is called context, and their classes e, n and c."""
    texts = [("A man sleeps.", "e"), ("It rains.", "n"), ("Nobody sleeps.", "c")] * 2
    rows = [{"context": "A man sleeps in his bed.", "hypothesis": text, "label": label} for text, label in texts]
    for file in ("train.jsonl", "R1/dev.jsonl", "R2/dev.jsonl", "R3/dev.jsonl"):
        path = tmp_path / "anli" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lines = reproduce("anli/nf2-r16", tmp_path / "out", "--model", minilm_dir, "--local", tmp_path / "anli")
    print(lines)
    state = json.loads((tmp_path / "out" / "reproduce.json").read_text(encoding="utf-8"))
    assert [(m["evaluation"], m["examples"]) for m in state["measured"]] == [("r1", 6), ("r2", 6), ("r3", 6)]
    record = TrainingRecord.load(tmp_path / "out" / "loftq" / "seed-0")
    assert record.labels == ["entailment", "neutral", "contradiction"]
    assert record.data["labels"] == dict.fromkeys(record.labels, 2)


@pytest.mark.parametrize("name", ["xsum/bart-nf4-r8", "xsum/bart-nf2-r16"])
def test_xsum_with_an_encoder_decoder_of_two_encoders(samples, minilm_dir, tmp_path, name):
    halves = {"encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1}
    model = tf.EncoderDecoderModel.from_encoder_decoder_pretrained(str(minilm_dir), str(minilm_dir), **halves)
    model.save_pretrained(tmp_path / "model")
    tf.AutoTokenizer.from_pretrained(minilm_dir).save_pretrained(tmp_path / "model")
    files = ["--local", samples / "xsum", "--file", "train=test1000.jsonl"]
    lines = reproduce(name, tmp_path / "out", "--model", tmp_path / "model", *files)
    print(lines)
    assert {line["metric"] for line in lines} == {"rouge1", "rouge2", "rougeLsum"}
    state = json.loads((tmp_path / "out" / "reproduce.json").read_text(encoding="utf-8"))
    assert all(row["rouge"] == conditions(True) for row in state["measured"])
