"""A run finds its model and its data from any directory, by what they are and not by how they were typed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import loftq
from loftq.data.prepare import DataSettings
from loftq.errors import BackboneMismatchError, ConfigError, OutputError, SourceError
from loftq.finetune.load import find_base, load_causal, load_run
from loftq.finetune.measure import evaluate_task
from loftq.finetune.places import candidates, is_same, places_of
from loftq.finetune.record import TrainingRecord
from loftq.finetune.run import train
from loftq.finetune.settings import TrainSettings


def settings(data: str, **changes) -> TrainSettings:
    held = DataSettings("completion", data)
    return TrainSettings(**{"data": held, "eval_data": held, "max_steps": 1, "batch_size": 12, **changes})


@pytest.fixture(scope="module")
def project(llama, sums, tmp_path_factory) -> Path:
    """A run that was typed with relative names, in the folder ``runs`` beside the quantized folder and the data."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(llama, folder / "q")
    shutil.copy(sums, folder / "sums.jsonl")
    before = Path.cwd()
    os.chdir(folder)
    try:
        train("runs/run", settings("sums.jsonl"), init_from="q", progress=False)
    finally:
        os.chdir(before)
    return folder


def test_a_run_loads_and_is_measured_from_another_directory(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = TrainingRecord.load(project / "runs" / "run")
    assert (record.base, record.init_from) == ("q", "q")
    assert record.places["q"] == {"absolute": str(project / "q"), "relative": "../../q"}
    result, used, _ = evaluate_task(str(project / "runs" / "run"), {}, progress=False)
    assert result.metrics["perplexity"] == pytest.approx(record.after["perplexity"], rel=1e-5)
    assert used.data == str(project / "sums.jsonl")
    load_causal(os.path.relpath(project / "runs" / "run"))


def test_peft_finds_the_backbone_from_another_directory(project, tmp_path, monkeypatch):
    from peft import AutoPeftModelForCausalLM

    monkeypatch.chdir(tmp_path)
    config = json.loads((project / "runs" / "run" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(project / "q")
    AutoPeftModelForCausalLM.from_pretrained(project / "runs" / "run")


def moved(project: Path, tmp_path: Path) -> Path:
    """The project at another place, as if the first were gone: its record says so."""
    there = Path(shutil.copytree(project, tmp_path / "there"))
    path = there / "runs" / "run" / "training.json"
    path.write_text(path.read_text().replace(str(project), str(tmp_path / "gone")))
    return there


def test_a_run_and_its_folder_may_move_together(project, tmp_path, monkeypatch):
    there = moved(project, tmp_path)
    monkeypatch.chdir(tmp_path)
    run = there / "runs" / "run"
    assert find_base(run, TrainingRecord.load(run)) == str(there / "q")
    _, used, _ = evaluate_task(str(run), {}, progress=False)
    assert used.data == str(there / "sums.jsonl")


def test_a_folder_that_was_moved_alone_is_named(project, llama, tmp_path, monkeypatch):
    there = moved(project, tmp_path)
    shutil.move(there / "q", tmp_path / "backbone")
    monkeypatch.chdir(tmp_path)
    run = there / "runs" / "run"
    with pytest.raises(SourceError, match=r"trained on .*gone/q, which does not exist here.* with --init-from"):
        load_run(run)
    load_run(run, init_from="backbone")
    result, _, _ = evaluate_task(str(run), {}, init_from="backbone", progress=False)
    assert "perplexity" in result.metrics
    with pytest.raises(ConfigError, match=r"--init-from is for a run of `loftq train`, but .* is none"):
        load_causal(str(llama), init_from="backbone")


def test_a_run_on_full_precision_is_not_put_on_a_quantized_folder(llama, sums, tmp_path):
    settings = TrainSettings(DataSettings("completion", sums), method="lora", max_steps=1)
    train(tmp_path / "run", settings, init_from=llama, progress=False)
    load_run(tmp_path / "run", init_from=llama.parent / "source")
    with pytest.raises(
        BackboneMismatchError, match=r"was trained on the full-precision .* is quantized; name that model's"
    ):
        load_run(tmp_path / "run", init_from=llama)


def test_a_folder_with_another_backbone_is_passed_over(project, tmp_path, monkeypatch):
    """What lies at the name as typed may be another model of that name."""
    there = moved(project, tmp_path)
    config = loftq.LoftQConfig(bits=2, rank=4, calibration=None)
    monkeypatch.chdir(tmp_path)
    source = json.loads((project / "q" / "loftq_report.json").read_text())["source"]["name"]
    loftq.quantize_checkpoint(source, "q", config, progress=False)
    run = there / "runs" / "run"
    record = TrainingRecord.load(run)
    assert find_base(run, record) == str(there / "q")
    shutil.rmtree(there / "q")
    with pytest.raises(BackboneMismatchError, match=r"trained on backbone .*but q holds .* with --init-from"):
        find_base(run, record)
    with pytest.raises(BackboneMismatchError, match="was trained on backbone"):
        load_run(run, init_from="q")


def test_a_record_without_places_is_read_as_before(project, tmp_path, monkeypatch):
    run = Path(shutil.copytree(project / "runs" / "run", tmp_path / "run"))
    values = json.loads((run / "training.json").read_text())
    del values["places"]
    (run / "training.json").write_text(json.dumps(values))
    monkeypatch.chdir(project)
    load_run(run)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="trained on q, which does not exist here"):
        load_run(run)


def test_the_same_run_typed_from_another_directory_is_the_same(project, tmp_path, monkeypatch):
    written = (project / "runs" / "run" / "training.json").stat().st_mtime_ns
    monkeypatch.chdir(project / "runs")
    train("run", settings("../sums.jsonl"), init_from="../q", progress=False)
    monkeypatch.chdir(tmp_path)
    os.symlink(project, "link")
    train("link/runs/run", settings("link/sums.jsonl"), init_from="link/q", progress=False)
    shutil.copytree(project / "q", "q")  # the same backbone
    train("link/runs/run", settings("link/sums.jsonl"), init_from="q", progress=False)
    assert (project / "runs" / "run" / "training.json").stat().st_mtime_ns == written


def test_another_file_of_the_same_name_is_another_setting(project, sums, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(sums, "sums.jsonl")
    with pytest.raises(OutputError) as refused:
        train(project / "runs" / "run", settings("sums.jsonl"), init_from=project / "q", progress=False)
    ours, theirs = project / "sums.jsonl", tmp_path / "sums.jsonl"
    assert f"other settings (data.data: '{ours}', not '{theirs}', eval_data.data: " in str(refused.value)


def test_a_folder_that_was_quantized_again_is_another_setting(project, tmp_path, monkeypatch):
    there = Path(shutil.copytree(project, tmp_path / "there"))
    source = json.loads((project / "q" / "loftq_report.json").read_text())["source"]["name"]
    shutil.rmtree(there / "q")
    config = loftq.LoftQConfig(bits=2, rank=4, calibration=None)
    loftq.quantize_checkpoint(source, there / "q", config, progress=False)
    monkeypatch.chdir(there)
    with pytest.raises(OutputError, match=r"other settings \(backbone_sha256: "):
        train("runs/run", settings("sums.jsonl"), init_from="q", progress=False)


def test_a_run_begun_before_places_were_recorded(project, tmp_path, monkeypatch):
    there = Path(shutil.copytree(project, tmp_path / "there"))
    path = there / "runs" / "run" / "started.json"
    values = json.loads(path.read_text())
    del values["places"], values["backbone_sha256"]
    path.write_text(json.dumps(values))
    monkeypatch.chdir(there)
    train("runs/run", settings("sums.jsonl"), init_from="q", progress=False)
    with pytest.raises(OutputError, match=r"other settings \(max_steps: 1, not 2\)"):
        train("runs/run", settings("sums.jsonl", max_steps=2), init_from="q", progress=False)


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    Path("ids.safetensors").touch()
    run = tmp_path / "run"
    places = places_of(run, ["a", "a/*.jsonl", "org/model", "ids.safetensors:k", None])
    assert places == {
        "a": {"absolute": str(tmp_path / "a"), "relative": "../a"},
        "ids.safetensors:k": {"absolute": str(tmp_path / "ids.safetensors:k"), "relative": "../ids.safetensors:k"},
    }
    assert candidates(run, "a", places) == ["a"]
    assert candidates(tmp_path / "b" / "run", "a", places) == ["a", str(tmp_path / "b" / "a")]
    assert candidates(run, "org/model", places) == ["org/model"]
    assert is_same(run, "org/model", places, "org/model")
    assert not is_same(run, "org/model", places, "a")
    Path("a").rmdir()
    assert is_same(run, "a", places, "a")  # gone since, and still what was meant
