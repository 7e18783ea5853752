from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from loftq.data.prepare import DataSettings
from loftq.errors import BackboneMismatchError, ConfigError, OutputError, SourceError
from loftq.finetune.load import load_run
from loftq.finetune.measure import evaluate_task
from loftq.finetune.record import TrainingRecord
from loftq.finetune.run import train
from loftq.finetune.settings import TrainSettings
from words import write_rows


def settings(data: str, task: str = "completion", **changes) -> TrainSettings:
    held = DataSettings(task, data)
    return TrainSettings(
        **{"data": held, "eval_data": held, "epochs": 6, "batch_size": 12, "learning_rate": 5e-3, **changes}
    )


@pytest.mark.parametrize("method", ["loftq", "lora", "full"])
def test_every_method_lowers_the_loss_and_leaves_a_result_that_loads(llama, sums, tmp_path, method):
    where = {"model": str(llama.parent / "source")} if method == "full" else {"init_from": llama}
    record = train(tmp_path / "run", settings(sums, method=method), progress=False, **where)
    print(method, record.before, record.after)
    assert record.status == "finished"
    assert record.after["perplexity"] < 0.7 * record.before["perplexity"]
    assert len(record.curve) == 18
    assert [e["step"] for e in record.evaluations] == [3, 6, 9, 12, 15, 18]
    assert TrainingRecord.load(tmp_path / "run").after == record.after
    result, _, _ = evaluate_task(str(tmp_path / "run"), {}, progress=False)
    assert result.metrics["perplexity"] == pytest.approx(record.after["perplexity"], rel=1e-5)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_fitted_adapter_is_where_training_starts(llama, sums, tmp_path):
    """Not PEFT's own initialisation: B is not zero, and the untrained run equals the quantized model with its adapter."""
    from loftq.finetune.adapter import load_factors, module_names
    from loftq.finetune.model import build, find_start
    from loftq.hub.load import load
    from loftq.report.record import QuantizationReport

    model, heads = build(find_start("loftq", llama, None), settings(sums))
    ids = torch.arange(6, 40)[None]
    with torch.no_grad():
        ours, theirs = model.eval()(input_ids=ids).logits, load(llama).eval()(input_ids=ids).logits
    assert heads == []
    assert torch.equal(ours, theirs)
    names = module_names(QuantizationReport.load(llama), model.get_base_model())
    assert len(names) == 14
    load_factors(model, llama, names)


def test_lora_and_loftq_differ_in_the_start_alone(llama, sums):
    from loftq.finetune.model import build, find_start

    found = {}
    for method in ("loftq", "lora"):
        model, _ = build(find_start(method, llama, None), settings(sums, method=method))
        found[method] = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
    assert found["loftq"] == found["lora"]
    assert len(found["loftq"]) == 28


def test_qlora_needs_a_plainly_quantized_folder(llama, sums, tmp_path):
    with pytest.raises(ConfigError, match=r"but .* was made by loftq; quantize again with --method qlora"):
        train(tmp_path / "run", settings(sums, method="qlora"), init_from=llama, progress=False)
    import loftq

    loftq.quantize_checkpoint(
        llama.parent / "source", tmp_path / "q", loftq.LoftQConfig(bits=4, rank=8, method="qlora"), progress=False
    )
    record = train(tmp_path / "run", settings(sums, method="qlora", epochs=1), init_from=tmp_path / "q", progress=False)
    assert record.after["perplexity"] < record.before["perplexity"]


def test_a_quantized_folder_is_trained_in_its_own_place(llama, sums, tmp_path):
    import shutil

    shutil.copytree(llama, tmp_path / "q")
    train(tmp_path / "q", settings(sums, epochs=1), progress=False)
    assert TrainingRecord.load(tmp_path / "q" / "finetuned").init_from == str(tmp_path / "q")


def test_dora_starts_where_the_fitted_model_was_and_trains(llama, sums, tmp_path):
    plain = train(tmp_path / "plain", settings(sums, epochs=1), init_from=llama, progress=False)
    dora = train(tmp_path / "dora", settings(sums, epochs=3, use_dora=True), init_from=llama, progress=False)
    assert dora.before["perplexity"] == pytest.approx(plain.before["perplexity"], rel=1e-5)
    assert dora.after["perplexity"] < 0.8 * dora.before["perplexity"]
    assert dora.trainable > plain.trainable
    result, _, _ = evaluate_task(str(tmp_path / "dora"), {}, progress=False)
    assert result.metrics["perplexity"] == pytest.approx(dora.after["perplexity"], rel=1e-5)


def test_rslora_and_alpha_of_the_folder_hold(llama, sums, tmp_path):
    from peft.tuners.lora import LoraLayer

    import loftq
    from loftq.finetune.model import build, find_start

    config = loftq.LoftQConfig(bits=4, rank=8, lora_alpha=32, use_rslora=True, calibration=None)
    loftq.quantize_checkpoint(llama.parent / "source", tmp_path / "q", config, progress=False)
    model, _ = build(find_start("loftq", tmp_path / "q", None), settings(sums))
    assert {m.scaling["default"] for m in model.modules() if isinstance(m, LoraLayer)} == {32 / 8**0.5}
    train(tmp_path / "run", settings(sums, epochs=1), init_from=tmp_path / "q", progress=False)


def test_a_bare_encoder_gets_a_head_and_its_adapter(bert, letters_a_or_b, tmp_path):
    record = train(
        tmp_path / "run", settings(letters_a_or_b, "classification", epochs=8), init_from=bert, progress=False
    )
    print(record.before, record.after)
    assert record.labels == ["first", "second"]
    assert record.heads == ["classifier"]
    assert record.after["accuracy"] == 100
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").open()]
    assert [(r["prediction"], r["reference"]) for r in rows[:2]] == [("first", "first"), ("second", "second")]
    assert rows[0]["id"].endswith("words.jsonl, line 1")
    result, _, _ = evaluate_task(str(tmp_path / "run"), {}, ["matthews", "accuracy"], progress=False)
    assert result.metrics["matthews"] == 100


def test_heads_begin_alike_for_every_method(bert, letters_a_or_b):
    from loftq.finetune.model import build, find_start

    heads = []
    for method in ("loftq", "lora", "full"):
        model, _ = build(
            find_start(method, bert, None), settings(letters_a_or_b, "classification", method=method), ["a", "b"]
        )
        heads.append(
            next(p for n, p in model.named_parameters() if "classifier" in n and n.endswith("weight")).detach()
        )
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[0], heads[2])
    assert heads[0].std() > 0


def test_regression_and_question_answering_and_summaries(bert, bart, tmp_path):
    values = write_rows(tmp_path / "v.jsonl", [{"text": "a" * n, "score": n} for n in range(1, 13)])
    record = train(
        tmp_path / "values", settings(values, "regression", epochs=20, batch_size=6), init_from=bert, progress=False
    )
    print(record.before, record.after)
    assert record.after["pearson"] > 80
    answers = [
        {"context": f"{'x' * n}b{'x' * (9 - n)}", "question": "b?", "answers": {"text": ["b"], "answer_start": [n]}}
        for n in range(10)
    ]
    asked = write_rows(tmp_path / "q.jsonl", answers)
    record = train(tmp_path / "qa", settings(asked, "qa", epochs=30, batch_size=5), init_from=bert, progress=False)
    print(record.before, record.after)
    assert record.heads == ["qa_outputs"]  # and the pooler, which this class leaves out, is not missed
    reloaded, _ = load_run(tmp_path / "qa")
    assert not any("pooler" in name for name, _ in reloaded.named_modules())
    assert record.after["exact_match"] > max(50, record.before["exact_match"])
    texts = write_rows(
        tmp_path / "s.jsonl", [{"text": c * n, "summary": f"{c}{c} {c}"} for n in range(3, 9) for c in "abc"]
    )
    record = train(
        tmp_path / "summaries",
        settings(texts, "summarization", epochs=80, eval_steps=80, batch_size=9, max_new_tokens=8),
        init_from=bart,
        progress=False,
    )
    print(record.before, record.after)
    assert record.after["rouge1"] > record.before["rouge1"] + 30


RUN = """
import sys
from loftq.data.prepare import DataSettings
from loftq.finetune.run import train
from loftq.finetune.settings import TrainSettings
data = DataSettings("completion", sys.argv[2])
settings = TrainSettings(data=data, eval_data=data, epochs=30, batch_size=6, learning_rate=5e-3, lora_dropout=0.1, eval_steps=5)
train(sys.argv[3], settings, init_from=sys.argv[1], progress=False)
"""


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_loss(llama, sums, tmp_path):
    """On the CPU to 1e-4: the order of the data, dropout, the optimizer and the schedule continue."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def start(out: Path) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", RUN, str(llama), sums, str(out)], env=environment)

    assert start(tmp_path / "whole").wait() == 0
    kills = 0
    while not (tmp_path / "parts" / "training.json").exists():
        process = start(tmp_path / "parts")
        before = len(list((tmp_path / "parts" / "checkpoints").glob("checkpoint-*")))
        latest = _latest(tmp_path / "parts")
        while process.poll() is None and kills < 3:
            if _latest(tmp_path / "parts") > latest + 15:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.02)
        assert process.wait() in (0, -signal.SIGKILL), before
    whole, parts = (TrainingRecord.load(tmp_path / name) for name in ("whole", "parts"))
    print(kills, whole.after, parts.after)
    assert kills == 3
    assert parts.after["loss"] == pytest.approx(whole.after["loss"], abs=1e-4)
    assert [c["step"] for c in parts.curve] == [c["step"] for c in whole.curve]
    assert parts.curve[-1]["loss"] == pytest.approx(whole.curve[-1]["loss"], abs=1e-4)


def _latest(run: Path) -> int:
    found = [p for p in (run / "checkpoints").glob("checkpoint-*") if (p / "trainer_state.json").exists()]
    return max((int(p.name.rpartition("-")[2]) for p in found), default=0)


def test_a_finished_run_is_not_run_again_and_other_settings_are_refused(llama, sums, tmp_path):
    first = train(tmp_path / "run", settings(sums, epochs=1), init_from=llama, progress=False)
    began = (tmp_path / "run" / "adapter_model.safetensors").stat().st_mtime_ns
    assert train(tmp_path / "run", settings(sums, epochs=1), init_from=llama, progress=False).after == first.after
    assert (tmp_path / "run" / "adapter_model.safetensors").stat().st_mtime_ns == began
    with pytest.raises(OutputError, match=r"holds a run with other settings \(epochs: 1, not 2\)"):
        train(tmp_path / "run", settings(sums, epochs=2), init_from=llama, progress=False)
    again = train(tmp_path / "run", settings(sums, epochs=2), init_from=llama, progress=False, resume=False)
    assert len(again.curve) == 6


def test_a_folder_with_something_else_is_left_alone(llama, sums, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match="holds something else"):
        train(tmp_path, settings(sums), init_from=llama, progress=False)


@pytest.mark.parametrize(
    ("method", "where", "words"),
    [
        ("loftq", {}, "trains a quantized folder, expected one with --init-from"),
        ("loftq", {"model": "source"}, "`loftq quantize "),
        ("qlora", {}, "--method qlora"),
        ("lora", {}, "trains a full-precision model, expected one with --model"),
        ("full", {"model": "q"}, "is quantized, but the method full trains a full-precision model"),
        ("full", {"model": "nowhere/at all"}, "does not exist"),
        ("loftq", {"init_from": "source"}, "is no quantized folder of loftq"),
    ],
)
def test_models_that_do_not_fit_the_method(llama, sums, tmp_path, method, where, words):
    where = {k: str(llama.parent / v) if v in ("q", "source") else v for k, v in where.items()}
    with pytest.raises((ConfigError, SourceError)) as error:
        train(tmp_path / "run", settings(sums, method=method), progress=False, **where)
    assert words in str(error.value), error.value
    assert not (tmp_path / "run" / "training.json").exists()


def test_modules_of_another_architecture(llama, bert):
    from loftq.finetune.adapter import module_names
    from loftq.hub.load import load
    from loftq.report.record import QuantizationReport

    model = load(llama).get_base_model()
    with pytest.raises(
        SourceError, match=r"LlamaForCausalLM has none of the quantized folder's modules, such as encoder"
    ):
        module_names(QuantizationReport.load(bert), model)
    report = QuantizationReport.load(llama)
    report.modules[3] = dataclasses.replace(report.modules[3], name="model.layers.7.self_attn.o_proj")
    with pytest.raises(SourceError, match=r"has no module model\.layers\.7\.self_attn\.o_proj"):
        module_names(report, model)


def test_a_model_of_another_kind(bert, tmp_path):
    texts = write_rows(tmp_path / "s.jsonl", [{"text": "a", "summary": "b"}])
    with pytest.raises(SourceError, match="does not load as a model for summarization"):
        train(
            tmp_path / "run",
            settings(texts, "summarization", method="full"),
            model=str(bert.parent / "source"),
            progress=False,
        )


def test_another_backbone_is_refused(llama, sums, tmp_path):
    import shutil

    import loftq

    shutil.copytree(llama, tmp_path / "q")
    train(tmp_path / "run", settings(sums, epochs=1), init_from=tmp_path / "q", progress=False)
    shutil.rmtree(tmp_path / "q")
    loftq.quantize_checkpoint(
        llama.parent / "source", tmp_path / "q", loftq.LoftQConfig(bits=2, rank=8, calibration=None), progress=False
    )
    with pytest.raises(BackboneMismatchError, match="an adapter only fits the backbone it was trained on"):
        load_run(tmp_path / "run")
