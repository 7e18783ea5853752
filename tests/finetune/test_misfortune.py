"""What goes wrong around a run: damaged and moved files, full disks, metrics without a value, models with peculiarities."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from letters import letters
from loftq.data.prepare import DataSettings
from loftq.errors import ConfigError, OutputError, SourceError
from loftq.finetune.adapter import module_names
from loftq.finetune.load import load_run
from loftq.finetune.measure import evaluate_task
from loftq.finetune.model import build, find_start
from loftq.finetune.packing import check_isolated
from loftq.finetune.record import TrainingRecord
from loftq.finetune.run import train
from loftq.finetune.settings import TrainSettings
from loftq.report.record import QuantizationReport
from small import quantized, quantized_roberta
from tiny import tiny_model
from words import write_rows


def short(data: str, task: str = "completion", **changes) -> TrainSettings:
    held = DataSettings(task, data)
    return TrainSettings(**{"data": held, "eval_data": held, "epochs": 1, "batch_size": 12, **changes})


@pytest.fixture(scope="module")
def finished(llama, sums, tmp_path_factory) -> Path:
    """A run, and a copy of its quantized folder beside it."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(llama, folder / "q")
    train(folder / "run", short(sums, max_steps=1), init_from=folder / "q", progress=False)
    return folder


def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


@pytest.mark.parametrize("text", ["{", "[]", '{"settings": 3}', "\x00"])
def test_a_damaged_start_is_one_sentence(finished, sums, tmp_path, text):
    run = copied(finished, tmp_path)
    (run / "started.json").write_text(text)
    with pytest.raises(OutputError, match=r"started.json is damaged .* start over with --no-resume"):
        train(run, short(sums, max_steps=1), init_from=finished / "q", progress=False)
    again = train(run, short(sums, max_steps=1), init_from=finished / "q", progress=False, resume=False)
    assert again.status == "finished"


@pytest.mark.parametrize("text", ["{", "[]", "{}", "null", "settings"])
def test_a_damaged_record_is_one_sentence(finished, tmp_path, text):
    run = copied(finished, tmp_path)
    if text == "settings":
        text = json.dumps({**json.loads((run / "training.json").read_text()), "settings": {"data": 3}})
    (run / "training.json").write_text(text)
    with pytest.raises(SourceError, match=r"training.json is damaged .*; train again"):
        TrainingRecord.load(run)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff" * 100, None])
def test_a_damaged_adapter_is_one_sentence(finished, tmp_path, content):
    run = copied(finished, tmp_path)
    path = run / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(SourceError, match=r"the adapter in .* does not load"):
        load_run(run)


def test_a_quantized_folder_that_was_moved(finished, tmp_path):
    run = copied(finished, tmp_path)
    record = json.loads((run / "training.json").read_text())
    (run / "training.json").write_text(json.dumps({**record, "base": str(tmp_path / "gone")}))
    with pytest.raises(SourceError, match="which does not exist here; put that quantized folder back"):
        load_run(run)


def test_a_damaged_quantized_folder_is_one_sentence(finished, sums, tmp_path):
    shutil.copytree(finished / "q", tmp_path / "q")
    path = tmp_path / "q" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SourceError):
        train(tmp_path / "run", short(sums, max_steps=1), init_from=tmp_path / "q", progress=False)


@pytest.mark.parametrize("name", ["training.json", "before.json", "adapter_model.safetensors", "predictions"])
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(finished, sums, tmp_path, monkeypatch, name):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {
        "training.json": "loftq.finetune.training.TrainingRecord.save",
        "before.json": "loftq.finetune.training.json.dumps",
        "adapter_model.safetensors": "loftq.finetune.training.save_result",
        "predictions": "loftq.finetune.training.write_predictions",
    }[name]
    settings = short(sums, max_steps=1, metrics=("exact_match",), max_new_tokens=2)
    with monkeypatch.context() as patched:
        real = json.dumps
        if name == "before.json":
            patched.setattr(
                target, lambda values, **options: full() if "exact_match" in values else real(values, **options)
            )
        else:
            patched.setattr(target, full)
        with pytest.raises(OutputError, match="is full"):
            train(tmp_path / "run", settings, init_from=finished / "q", progress=False)
    record = train(tmp_path / "run", settings, init_from=finished / "q", progress=False)
    assert record.status == "finished"
    assert set(record.before) == {"exact_match", "exact_match_se"}


def test_a_run_without_result_says_so_again(finished, sums, tmp_path):
    """It diverged before its first checkpoint: the same command must not pass for a finished run."""
    run = copied(finished, tmp_path)
    record = json.loads((run / "training.json").read_text())
    changed = {**record, "status": "diverged: the loss is no finite number at step 1", "best_step": 0}
    (run / "training.json").write_text(json.dumps(changed))
    with pytest.raises(OutputError, match="diverged before its first good checkpoint and has no result"):
        train(run, short(sums, max_steps=1), init_from=finished / "q", progress=False)


def test_two_identical_runs_are_identical(finished, sums, tmp_path):
    weights, curves = [], []
    for name in ("a", "b"):
        record = train(tmp_path / name, short(sums, lora_dropout=0.1), init_from=finished / "q", progress=False)
        weights.append(load_file(tmp_path / name / "adapter_model.safetensors"))
        curves.append([(c["loss"], c["grad_norm"]) for c in record.curve])
    assert curves[0] == curves[1]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_a_metric_without_a_value_does_not_end_the_run(bert, tmp_path):
    """The correlation with a constant is undefined."""
    data = write_rows(tmp_path / "r.jsonl", [{"text": "a" * n, "label": 1.5} for n in range(1, 5)])
    record = train(tmp_path / "run", short(data, "regression", epochs=2), init_from=bert, progress=False)
    assert record.status == "finished"
    assert "pearson" not in record.after


def test_measuring_a_run_writes_texts_as_the_run_did(finished, sums, tmp_path):
    settings = short(sums, max_steps=1, metrics=("exact_match",), max_new_tokens=3)
    train(tmp_path / "run", settings, init_from=finished / "q", progress=False)
    result, _, _ = evaluate_task(str(tmp_path / "run"), {}, progress=False)
    assert all(len(p.prediction) <= 3 for p in result.predictions)


def test_a_part_that_the_head_does_not_use_is_left_out(bert, tmp_path):
    """BERT's pooler: the quantized encoder has it, a model for question answering has not."""
    report = QuantizationReport.load(bert)
    assert "pooler.dense" in [m.name for m in report.modules]
    with torch.device("meta"):
        config = tf.AutoConfig.from_pretrained(bert.parent / "source")
        model = tf.BertForQuestionAnswering(config)
        names = module_names(report, model)
        del model.bert.encoder.layer[1].output.dense
        with pytest.raises(SourceError, match=r"has no module encoder.layer.1.output.dense"):
            module_names(report, model)
    assert "pooler.dense" not in names
    assert len(names) == len(report.modules) - 1
    rows = [{"context": "a b c", "question": "q", "answers": {"text": ["b"], "answer_start": [2]}}] * 4
    record = train(
        tmp_path / "run", short(write_rows(tmp_path / "q.jsonl", rows), "qa"), init_from=bert, progress=False
    )
    result, _, _ = evaluate_task(str(tmp_path / "run"), {}, progress=False)
    assert result.metrics == record.after


def test_a_head_has_no_adapter_though_it_is_named_like_a_quantized_module(tmp_path):
    """RoBERTa's ``classifier.dense`` beside the encoder's ``dense``."""
    folder = quantized_roberta(tmp_path)
    start = find_start("loftq", folder, None)
    model, heads = build(start, short("x", "classification"), ["a", "b"])
    assert heads == ["classifier"]
    adapted = {n for n, m in model.named_modules() if hasattr(m, "lora_A") and len(m.lora_A)}
    assert adapted
    assert not [n for n in adapted if "classifier" in n]
    assert model.base_model.model.classifier.modules_to_save["default"].dense.weight.requires_grad


def test_dora_on_quantized_embeddings_is_refused(tmp_path):
    with torch.no_grad():
        folder = quantized(tiny_model("deberta-v2"), tmp_path, quantize_embeddings=True)
    with pytest.raises(ConfigError, match=r"an adapter on the embedding deberta.embeddings.word_embeddings"):
        build(find_start("loftq", folder, None), short("x", "classification", use_dora=True), ["a", "b"])


def test_all_weights_are_trained_in_float32(bert):
    """AdamW's steps of 1e-5 are below bfloat16's resolution of 1e-2 already at weights of 0.01."""
    start = find_start("full", None, str(bert.parent / "source"))
    model, _ = build(start, short("x", "classification", method="full", dtype="bfloat16"), ["a", "b"])
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("task", ["causal", "completion"])
def test_an_encoder_is_not_trained_to_predict_what_it_sees(tmp_path, sums, task):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = tf.BertForMaskedLM(tf.BertConfig(vocab_size=len(letters()), max_position_embeddings=128, **sizes))
    folder = quantized(model, tmp_path)
    settings = short(sums if task == "completion" else str(Path(__file__)), task)
    with pytest.raises(SourceError, match="is a BertLMHeadModel in which a token sees those behind it"):
        train(tmp_path / "run", settings, init_from=folder, progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "apart"), [("llama", True), ("gpt2", True), ("opt", False)])
def test_packing_needs_a_model_that_keeps_texts_apart(name, apart):
    model = tiny_model(name)
    if apart:
        check_isolated(model)
    else:
        with pytest.raises(
            ConfigError, match="OPTForCausalLM does not keep the texts of a window apart; turn packing off"
        ):
            check_isolated(model)


def test_a_packed_quantized_model_keeps_texts_apart_and_padding_out(finished, sums, tmp_path):
    data = DataSettings("completion", sums, packing=True)
    settings = TrainSettings(data, DataSettings("completion", sums), epochs=1, batch_size=2)
    record = train(tmp_path / "run", settings, init_from=finished / "q", progress=False)
    single, _, _ = evaluate_task(str(tmp_path / "run"), {}, batch_size=1, progress=False)
    assert single.metrics["perplexity"] == pytest.approx(record.after["perplexity"], rel=1e-5)


def test_weights_that_do_not_fit_their_config_are_refused(bert, letters_a_or_b, tmp_path):
    """Another vocabulary: the embedding would be begun anew without a word."""
    shutil.copytree(bert.parent / "source", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 1}))
    settings = short(letters_a_or_b, "classification", method="full", max_steps=1)
    with pytest.raises(SourceError, match=r"bert.embeddings.word_embeddings.weight in another shape"):
        train(tmp_path / "run", settings, model=str(tmp_path / "m"), progress=False)


def test_a_head_is_trained_in_float32_on_a_bfloat16_body(bert, letters_a_or_b, tmp_path):
    settings = short(letters_a_or_b, "classification", dtype="bfloat16")
    model, _ = build(find_start("loftq", bert, None), settings, ["first", "second"])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.bfloat16 in {p.dtype for p in model.parameters()}
    record = train(tmp_path / "run", settings, init_from=bert, progress=False)
    assert record.status == "finished"
    kept = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert {t.dtype for t in kept.values()} == {torch.float32}
    result, _, _ = evaluate_task(str(tmp_path / "run"), {}, dtype="bfloat16", progress=False)
    assert result.metrics["accuracy"] is not None


def test_f1_of_more_classes_than_two(bert, finished, tmp_path, monkeypatch):
    """It would end a run only once a third class is predicted, or stands in the evaluation data."""
    monkeypatch.setattr("loftq.finetune.training.build", lambda *a: pytest.fail("the model was loaded"))
    three = write_rows(tmp_path / "three.jsonl", [{"text": c, "label": c} for c in "abc"])
    two = write_rows(tmp_path / "two.jsonl", [{"text": c, "label": c} for c in "ab"])
    data = DataSettings("classification", three)
    settings = short(three, "classification", eval_data=data.replace(data=two), metrics=("accuracy", "f1"))
    with pytest.raises(
        ConfigError, match=r"f1 is that of the second of two classes, but there are 3 \(a, b, c\); use f1_macro"
    ):
        train(tmp_path / "run", settings, init_from=bert, progress=False)
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    train(tmp_path / "run", settings.replace(metrics=("f1_macro",), max_steps=1), init_from=bert, progress=False)
    with pytest.raises(ConfigError, match="use f1_macro"):
        evaluate_task(str(tmp_path / "run"), {}, ["f1"], progress=False)


def test_texts_that_are_trained_apart_are_measured_apart(llama, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": c * 8} for c in "abcd"])
    apart = DataSettings("causal", rows, packing=False)
    run, other = tmp_path / "run", tmp_path / "other"
    record = train(run, TrainSettings(apart, apart, max_steps=1), init_from=llama, progress=False)
    assert (record.data["examples"], record.eval_data["examples"]) == (4, 4)
    found, settings, _ = evaluate_task(str(run), {}, progress=False)
    assert settings.packing is False
    assert found.metrics["perplexity"] == pytest.approx(record.after["perplexity"], rel=1e-5)
    single, settings, _ = evaluate_task(str(llama), {"task": "causal", "data": rows, "packing": False}, progress=False)
    assert settings.packing is False
    assert single.metrics["perplexity"] == pytest.approx(record.before["perplexity"], rel=1e-5)
    stream = DataSettings("causal", rows)
    record = train(other, TrainSettings(stream, stream, max_steps=1), init_from=llama, progress=False)
    assert record.eval_data["examples"] == 1
