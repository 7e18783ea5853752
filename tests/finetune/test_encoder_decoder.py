"""Encoder-decoders from quantization to a measured run: BART, whose two halves share an embedding, and two encoders that
``EncoderDecoderModel`` puts together, with a nested config that names no token to begin or end with."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as tf

import loftq
from loftq.data.collate import writing_ids
from loftq.data.prepare import DataSettings, prepare
from loftq.errors import ConfigError
from loftq.evaluate.generation import generate_ids
from loftq.evaluate.models import load_tokenizer
from loftq.evaluate.rouge import conditions
from loftq.finetune.load import load_run
from loftq.finetune.measure import evaluate_task
from loftq.finetune.run import train
from loftq.finetune.settings import TrainSettings
from words import write_rows


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> str:
    rows = [{"text": c * n, "summary": f"{c}{c} {c}"} for n in range(3, 9) for c in "abc"]
    return write_rows(tmp_path_factory.mktemp("texts") / "texts.jsonl", rows)


def settings(data: str, **changes) -> TrainSettings:
    held = DataSettings("summarization", data, max_target_length=12)
    values = {"max_steps": 150, "eval_steps": 75, "batch_size": 9, "learning_rate": 5e-3, "max_new_tokens": 10}
    return TrainSettings(**{"data": held, "eval_data": held, **values, **changes})


@pytest.mark.parametrize("name", ["bart", "encoder_decoder"])
def test_quantize_train_evaluate_reload(request, texts, tmp_path, name):
    folder = request.getfixturevalue(name)
    record = train(tmp_path / "run", settings(texts), init_from=folder, progress=False)
    print(name, record.before, record.after)
    assert record.after["rouge1"] > record.before["rouge1"] + 50
    result, _, _ = evaluate_task(str(tmp_path / "run"), {}, progress=False)
    assert result.metrics["rouge1"] == pytest.approx(record.after["rouge1"])
    assert record.eval_data["rouge"] == result.rouge == conditions(stem=True)
    words, _, _ = evaluate_task(str(tmp_path / "run"), {"limit": 1}, rouge_stem=False, progress=False)
    assert words.rouge == conditions(stem=False)
    said = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").open(encoding="utf-8")]
    assert [p.prediction for p in result.predictions] == [row["prediction"] for row in said]
    assert {len(row["prediction"]) for row in said} == {4}, said  # "aa a" and no more: it has learned to stop


@pytest.mark.parametrize("name", ["bart", "encoder_decoder"])
def test_a_full_precision_run_is_a_model_that_reloads(request, texts, tmp_path, name):
    source = request.getfixturevalue(name).parent / "source"
    chosen = settings(texts, method="full", max_steps=40, eval_steps=40)
    record = train(tmp_path / "run", chosen, model=str(source), progress=False)
    result, _, _ = evaluate_task(str(tmp_path / "run"), {}, progress=False)
    assert result.metrics["rouge1"] == pytest.approx(record.after["rouge1"])
    saved = tf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run")
    assert saved.config.decoder_start_token_id is not None
    assert saved.config.pad_token_id is not None


def test_the_shared_embedding_of_bart_is_one(bart):
    """Tied in the source, stored once, and still one tensor in the packed model with its adapter."""
    model = loftq.load(bart).get_base_model()
    shared = model.model.shared.weight
    for other in (model.model.encoder.embed_tokens, model.model.decoder.embed_tokens, model.lm_head):
        assert other.weight.data_ptr() == shared.data_ptr()
    config = loftq.LoftQConfig(bits=4, rank=4, calibration=None, quantize_embeddings=True)
    with pytest.raises(ConfigError, match="shares its weight with another module"):
        loftq.quantize_checkpoint(bart.parent / "source", bart.parent / "e", config, progress=False)


def test_the_folder_of_two_encoders_writes_and_exports(encoder_decoder, tmp_path):
    model = loftq.load(encoder_decoder)
    assert type(model).__name__ == "PeftModelForSeq2SeqLM"
    names = [record["name"] for record in json.loads((encoder_decoder / "loftq_report.json").read_text())["modules"]]
    assert "decoder.bert.encoder.layer.0.crossattention.self.query" in names
    assert "enc_to_dec_proj" in names
    assert not any("predictions.decoder" in name for name in names)  # its weight is the embedding's
    ids = torch.arange(6, 20)[None]
    loftq.export_dense(encoder_decoder, tmp_path / "dense", dtype="float32")
    dense = tf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "dense").eval()
    with torch.no_grad():
        found, wanted = (m(input_ids=ids, decoder_input_ids=ids).logits for m in (dense, model.eval()))
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))


def test_embeddings_of_two_encoders_are_two(encoder_decoder, texts, tmp_path):
    """The encoder's is quantized; the decoder's, of the same name, is the head's weight and is not."""
    config = loftq.LoftQConfig(bits=4, rank=4, calibration=None, quantize_embeddings=True)
    loftq.quantize_checkpoint(encoder_decoder.parent / "source", tmp_path / "q", config, progress=False)
    record = train(
        tmp_path / "run", settings(texts, max_steps=2, eval_steps=2), init_from=tmp_path / "q", progress=False
    )
    model, _ = load_run(tmp_path / "run")
    kinds = {n: type(m).__name__ for n, m in model.named_modules() if n.endswith("word_embeddings.base_layer")}
    assert kinds == {"base_model.model.encoder.embeddings.word_embeddings.base_layer": "QuantEmbedding"}
    assert record.status == "finished"


def test_the_tokens_to_begin_and_end_with_are_the_tokenizers(encoder_decoder):
    model, tokenizer = loftq.load(encoder_decoder), load_tokenizer(encoder_decoder)
    assert model.config.decoder_start_token_id is model.generation_config.decoder_start_token_id is None
    writing_ids(model, tokenizer)
    assert model.config.decoder_start_token_id == model.generation_config.decoder_start_token_id == 1  # <s>
    assert model.generation_config.eos_token_id == 3  # <sep>, with which the tokenizer ends texts
    assert model.config.pad_token_id == 0


def test_what_the_model_says_itself_stays(bart):
    model, tokenizer = loftq.load(bart), load_tokenizer(bart)
    writing_ids(model, tokenizer)
    assert model.config.decoder_start_token_id == model.generation_config.decoder_start_token_id == 2
    assert model.generation_config.eos_token_id == 2


def test_a_model_without_any_token_to_begin_with(encoder_decoder, texts, tmp_path):
    shutil.copytree(encoder_decoder, tmp_path / "q")
    path = tmp_path / "q" / "tokenizer_config.json"
    values = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("bos_token", "cls_token")}
    path.write_text(json.dumps(values))
    with pytest.raises(
        ConfigError, match="name no token that a text of the decoder begins with; set decoder_start_token_id"
    ):
        train(tmp_path / "run", settings(texts), init_from=tmp_path / "q", progress=False)
    assert not (tmp_path / "run").exists()


def test_each_half_has_its_own_positions(encoder_decoder, texts):
    """128 to read and 40 to write."""
    model, tokenizer = loftq.load(encoder_decoder), load_tokenizer(encoder_decoder)
    config = model.get_base_model().config
    assert DataSettings("summarization", texts).length(config) == 128
    with pytest.raises(ConfigError, match="max_target_length is 41, but the model has 40 positions"):
        prepare(DataSettings("summarization", texts, max_target_length=41), tokenizer, config)
    writing_ids(model, tokenizer)
    generate_ids(model, [[6] * 128], max_new_tokens=40, batch_size=1)
    for prompt, new in (([6] * 129, 5), ([6] * 5, 41)):
        with pytest.raises(ConfigError, match=r"the model has 128 positions to read and 40 to write"):
            generate_ids(model, [prompt], max_new_tokens=new, batch_size=1)
