"""The encoder of the paper's tables, embedding quantized as there: SQuAD's and ANLI's command lines on a tiny random one."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf
from typer.testing import CliRunner

from letters import letters
from loftq.cli import app
from loftq.finetune.record import TrainingRecord
from words import write_rows


@pytest.fixture(scope="module")
def deberta(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deberta")
    torch.manual_seed(0)
    config = tf.DebertaV2Config(
        vocab_size=len(letters()),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        relative_attention=True,
        position_buckets=16,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        type_vocab_size=0,
    )
    tf.DebertaV2Model(config).save_pretrained(folder / "source")
    letters(pair=True).save_pretrained(folder / "source")
    invoke("quantize", folder / "source", "--bits", 4, "--rank", 8, "--quantize-embeddings", "--out", folder / "q")
    return folder / "q"


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def test_inference_in_three_classes(deberta, tmp_path):
    kinds = {"entailment": "aa", "neutral": "bb", "contradiction": "cc"}
    rows = [
        {"premise": "a" * n, "hypothesis": text, "label": name} for n in range(1, 9) for name, text in kinds.items()
    ]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    options = ["--labels", "entailment,neutral,contradiction", "--epochs", 40, "--batch-size", 12, "--lr", 3e-3]
    learned(
        deberta,
        tmp_path / "run",
        ["--task", "classification", "--data", path, "--eval-data", path, *options],
        "accuracy",
    )
    assert TrainingRecord.load(tmp_path / "run").labels == list(kinds)


def test_questions(deberta, tmp_path):
    rows = [
        {"context": f"{'x' * n}bc{'x' * (8 - n)}", "question": "b?", "answers": {"text": ["bc"], "answer_start": [n]}}
        for n in range(9)
    ]
    path = write_rows(tmp_path / "questions.jsonl", rows)
    options = ["--epochs", 30, "--batch-size", 5, "--lr", 5e-3]
    learned(deberta, tmp_path / "run", ["--task", "qa", "--data", path, "--eval-data", path, *options], "exact_match")


def learned(folder, run, options: list, metric: str) -> None:
    """Train and measure; the measurement of the reloaded run is that of the training's end."""
    invoke("train", run, "--init-from", folder, *options)
    record = TrainingRecord.load(run)
    print(record.before, record.after)
    assert record.after[metric] > record.before[metric] + 40
    assert json.loads(invoke("evaluate", run, "--json"))["metrics"][metric] == pytest.approx(record.after[metric])
