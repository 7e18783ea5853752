"""A step is the same whether its examples come as one batch or as several: every learned token, or example, counts once."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from letters import letters
from loftq.data.prepare import DataSettings
from loftq.finetune.measure import evaluate_task
from loftq.finetune.run import train
from loftq.finetune.settings import TrainSettings
from words import write_rows

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _model(name: str) -> tf.PreTrainedModel:
    """A small one without dropout."""
    torch.manual_seed(0)
    vocabulary = len(letters())
    sizes = {"vocab_size": vocabulary, "max_position_embeddings": 64, **_SIZES}
    half = {**sizes, **_IDS, "num_key_value_heads": 2, "head_dim": 16, "dropout_rate": 0.0}
    if name == "bart":
        parts = {"layers": 1, "attention_heads": 2, "ffn_dim": 48}
        halves = {f"{side}_{part}": n for side in ("encoder", "decoder") for part, n in parts.items()}
        start = {"decoder_start_token_id": 2, "forced_eos_token_id": 2, "dropout": 0.0}
        config = tf.BartConfig(vocab_size=vocabulary, d_model=32, max_position_embeddings=64, **halves, **start, **_IDS)
        return tf.BartForConditionalGeneration(config)
    if name == "t5gemma":
        config = tf.T5GemmaConfig(encoder=half, decoder=half, vocab_size=vocabulary, dropout_rate=0.0)
        return tf.T5GemmaForConditionalGeneration(config)
    if name == "t5gemma2":
        seen = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        seen |= {"image_size": 28, "patch_size": 14}
        encoder = {"text_config": half, "vision_config": seen, "mm_tokens_per_image": 4}
        config = tf.T5Gemma2Config(
            encoder={**encoder, "image_token_index": 5, "eoi_token_index": 4, "boi_token_index": 3},
            decoder=half,
            image_token_index=5,
        )
        return tf.T5Gemma2ForConditionalGeneration(config)
    if name == "llama":
        return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, **_IDS, num_key_value_heads=2))
    return tf.BertModel(tf.BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


_ROWS = [{"text": "ab" * n, "summary": "c" * (1 + 3 * (n % 4)), "label": n % 2} for n in range(1, 12)]
_TASKS = {"llama": "completion", "bert": "classification"}


@pytest.mark.parametrize("name", ["llama", "bert", "bart", "t5gemma", "t5gemma2"])
def test_accumulated_batches_are_the_same_steps(tmp_path, name):
    """11 rows: a step of 8, and one of 3, of which the last batch of 2 has one."""
    source = tmp_path / "source"
    _model(name).save_pretrained(source)
    letters(chat=False).save_pretrained(source)
    rows = write_rows(tmp_path / "rows.jsonl", _ROWS)
    task = _TASKS.get(name, "summarization")
    columns = {"text": "prompt", "summary": "completion"} if task == "completion" else {}
    data = DataSettings(task, rows, map=columns, max_target_length=32)
    settings = TrainSettings(data, method="full", epochs=2, learning_rate=1e-2, batch_size=8, dtype="float32")
    whole = train(tmp_path / "whole", settings, model=str(source), progress=False)
    parts = settings.replace(batch_size=2, gradient_accumulation=4)
    accumulated = train(tmp_path / "parts", parts, model=str(source), progress=False)
    assert len(whole.curve) == 4
    for one, other in zip(whole.curve, accumulated.curve, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_a_config_without_a_token_to_begin_with(tmp_path):
    """T5Gemma's has no decoder_start_token_id: what it writes begins as what it has learned from, its decoder's ``bos``."""
    model = _model("t5gemma")
    assert not hasattr(model.config, "decoder_start_token_id")
    model.save_pretrained(tmp_path / "source")
    letters(chat=False).save_pretrained(tmp_path / "source")
    data = DataSettings("summarization", write_rows(tmp_path / "rows.jsonl", _ROWS), max_target_length=32)
    values = {"method": "lora", "rank": 4, "max_steps": 2, "max_new_tokens": 6, "batch_size": 4}
    record = train(
        tmp_path / "run", TrainSettings(data, data, **values), model=str(tmp_path / "source"), progress=False
    )
    result, _, _ = evaluate_task(str(tmp_path / "run"), {}, progress=False)
    assert result.metrics["rouge1"] == pytest.approx(record.after["rouge1"])
