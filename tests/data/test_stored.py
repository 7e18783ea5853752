from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from loftq.cli import app
from loftq.data.prepare import DataSettings, prepare
from loftq.data.stored import stored_examples
from loftq.errors import ConfigError, SourceError
from loftq.evaluate.models import load_config
from loftq.finetune.measure import evaluate_task
from loftq.finetune.run import train
from loftq.finetune.settings import TrainSettings


@pytest.fixture
def ids(tmp_path):
    save_file({"own": torch.arange(10), "far": torch.tensor([3, 512])}, tmp_path / "ids.safetensors")
    return f"{tmp_path / 'ids.safetensors'}:"


def test_every_id_is_in_one_window(ids):
    found, labels = prepare(DataSettings("causal", ids + "own", max_length=4), None)
    assert [e.input_ids.tolist() for e in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert labels is None
    assert found.predicted == 3 + 3 + 1
    assert found[1].where.endswith("ids.safetensors:own, token 4")


def test_a_single_id_predicts_nothing():
    assert [len(e.input_ids) for e in stored_examples(torch.arange(9), "ids", 4)] == [4, 4]
    with pytest.raises(SourceError, match="has 1 token ids, expected at least 2"):
        stored_examples(torch.arange(1), "ids", 4)


def test_ids_beyond_the_vocabulary_are_refused(ids, stories_dir):
    with pytest.raises(ConfigError, match="ids 3 to 512, expected ids from 0 to 511"):
        prepare(DataSettings("causal", ids + "far"), None, load_config(stories_dir))
    with pytest.raises(ConfigError, match="ids -1 to 3, expected none below 0"):
        stored_examples(torch.tensor([3, -1]), "ids", 4)


def test_there_are_no_rows_to_limit(ids):
    with pytest.raises(ConfigError, match="one stream of token ids"):
        prepare(DataSettings("causal", ids + "own", limit=3), None)


def test_other_tasks_read_texts(ids, stories_dir, tmp_path):
    settings = TrainSettings(DataSettings("completion", ids + "own"), method="lora")
    with pytest.raises(SourceError, match="has no tokenizer"):
        train(tmp_path / "run", settings, model=str(stories_dir), progress=False)


def test_a_model_without_tokenizer_is_trained_and_measured(stories_dir, tmp_path):
    tokens = f"{stories_dir}/tokens.safetensors:"
    held = DataSettings("causal", tokens + "eval", max_length=256)
    settings = TrainSettings(
        held.replace(data=tokens + "train"), held, method="lora", max_steps=4, batch_size=4, rank=4, learning_rate=1e-3
    )
    record = train(tmp_path / "run", settings, model=str(stories_dir), progress=False)
    # sum of -log p over what 45 windows predict, by an independent loop; 6.836 with the first token of each as well
    assert record.before["perplexity"] == pytest.approx(6.84348, abs=1e-4)
    assert record.after["perplexity"] != record.before["perplexity"]
    again, _, _ = evaluate_task(str(tmp_path / "run"), {}, progress=False)
    assert again.metrics["perplexity"] == pytest.approx(record.after["perplexity"], rel=1e-5)
    arguments = ["data", "check", str(stories_dir), "--task", "causal", "--data", tokens + "eval", "--json"]
    checked = CliRunner().invoke(app, arguments)
    shown = json.loads(checked.stdout)
    assert shown["tokens"] == 11464
    assert shown["shown"][0]["tokens"][1][2]
