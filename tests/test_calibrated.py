"""A quantization with a calibration text, from the text to the finished folder; on stories260K, which is a real model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import loftq
from loftq import pipeline
from loftq.calibrate.choose import collect_statistics
from loftq.cli import app, main
from loftq.evaluate.perplexity import perplexity

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def train(stories_dir) -> str:
    return f"{stories_dir}/tokens.safetensors:train"


@pytest.fixture(scope="module")
def evaluation(stories_dir) -> torch.Tensor:
    return load_file(stories_dir / "tokens.safetensors")["eval"].long()[:2048]


def config(train, **changes) -> loftq.LoftQConfig:
    options = {"bits": 2, "rank": 8, "num_iter": 2, "calibration": train, "calibration_samples": 16}
    return loftq.LoftQConfig(**{**options, "calibration_length": 128, **changes})


def files(folder) -> dict[str, bytes]:
    """Everything but the report, which has times in it."""
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "loftq_report.json"}


def score(folder, ids) -> float:
    return perplexity(loftq.load(folder, dtype=torch.float32), ids, window=256).perplexity


@pytest.fixture(scope="module")
def calibrated(stories_dir, train, tmp_path_factory):
    """The default: gradients, no propagation."""
    out = tmp_path_factory.mktemp("calibrated") / "out"
    return out, loftq.quantize_checkpoint(stories_dir, out, config(train), progress=False)


def test_report_says_what_was_calibrated(calibrated, train):
    _, report = calibrated
    assert report.config["method"] == "loftq-data"
    text = report.calibration
    assert (text["name"], text["windows"], text["length"], text["tokens"]) == (train, 16, 128, 2048)
    assert text["gradients"]
    assert not text["propagate"]
    assert all(m.calibration_tokens == 2048 and m.method == "loftq-data" for m in report.modules)


def test_the_default_method_is_that_of_the_mean_width(stories_dir, train, tmp_path):
    mixed = config(train, first_layers_bits=(4, 4), num_iter=0)
    report = loftq.quantize_checkpoint(stories_dir, tmp_path / "out", mixed, progress=False)
    assert sum(m.bits for m in report.modules) / len(report.modules) > 3
    assert report.config["method"] == "loftq-data-zero"


def test_calibration_beats_weight_only_and_qera(calibrated, stories_dir, train, evaluation, tmp_path):
    out, _ = calibrated
    found = {"loftq-data": score(out, evaluation)}
    for method in ("loftq", "qera", "cloq", "lq-lora"):
        loftq.quantize_checkpoint(stories_dir, tmp_path / method, config(train, method=method), progress=False)
        found[method] = score(tmp_path / method, evaluation)
    assert min(found, key=found.__getitem__) == "loftq-data", found
    assert found["loftq-data"] < 0.75 * found["qera"]


def test_saved_statistics_give_the_same_folder(calibrated, stories_dir, train, tmp_path):
    out, _ = calibrated
    statistics = collect_statistics(stories_dir, config(train), progress=False)
    statistics.save(tmp_path / "statistics.safetensors")
    again = tmp_path / "again"
    loftq.quantize_checkpoint(
        stories_dir, again, config(train), statistics=tmp_path / "statistics.safetensors", progress=False
    )
    first, second = files(out), files(again)
    first.pop("adapter_config.json"), second.pop("adapter_config.json")  # it names the folder
    assert first == second


@pytest.mark.parametrize("options", [{}, {"propagate": True}], ids=["gradients", "propagate"])
def test_interrupted_and_continued(options, stories_dir, train, tmp_path, monkeypatch):
    """The layers that are done are not computed again, but with propagation the others must see them."""
    whole, cut = tmp_path / "whole" / "out", tmp_path / "cut" / "out"
    chosen = config(train, **options)
    loftq.quantize_checkpoint(stories_dir, whole, chosen, progress=False)
    plain = pipeline.Staging.write_unit
    written = []

    def write(staging, unit, *rest):
        if len(written) == 25:
            raise KeyboardInterrupt
        written.append(unit)
        plain(staging, unit, *rest)

    monkeypatch.setattr(pipeline.Staging, "write_unit", write)
    with pytest.raises(KeyboardInterrupt):
        loftq.quantize_checkpoint(stories_dir, cut, chosen, progress=False)
    done = list(written)
    written.clear()
    monkeypatch.setattr(pipeline.Staging, "write_unit", lambda *a: (written.append(a[1]), plain(*a)))
    loftq.quantize_checkpoint(stories_dir, cut, chosen, progress=False)
    assert not set(done) & set(written)
    first, second = files(whole), files(cut)
    first.pop("adapter_config.json"), second.pop("adapter_config.json")
    assert first == second


def test_propagation_lowers_the_perplexity(stories_dir, train, evaluation, tmp_path):
    found = {}
    for propagate in (False, True):
        out = tmp_path / str(propagate)
        chosen = config(train, propagate=propagate, calibration_gradients=0)
        loftq.quantize_checkpoint(stories_dir, out, chosen, progress=False)
        found[propagate] = score(out, evaluation)
    assert found[True] < found[False]


def test_model_without_tokenizer_is_quantized_weight_only_and_says_so(stories_dir, tmp_path):
    said: list[str] = []
    report = loftq.quantize_checkpoint(
        stories_dir, tmp_path / "out", loftq.LoftQConfig(bits=2, rank=4), progress=False, notice=said.append
    )
    assert report.calibration is None
    assert report.config["method"] == "loftq"
    assert len(said) == 1
    assert "no calibration" in said[0]


def test_what_is_said_of_the_calibration_is_what_is_used(llama, tmp_path):
    """The model has 128 positions; a folder that is finished is not calibrated."""
    said: list[str] = []
    config = loftq.LoftQConfig(bits=4, rank=4, calibration_samples=2, calibration_gradients=0)
    where = llama.parent / "source", tmp_path / "out", config
    report = loftq.quantize_checkpoint(*where, progress=False, notice=said.append)
    assert (report.calibration["windows"], report.calibration["tokens"]) == (2, 256)
    assert [s.partition(";")[0] for s in said] == ["calibrating on the built-in text (2 windows of 128 tokens)"]
    said.clear()
    loftq.quantize_checkpoint(*where, progress=False, notice=said.append)
    assert said == [f"{tmp_path / 'out'} is finished already, with these settings; nothing was computed"]


def test_a_short_text_is_a_note_in_one_sentence(llama, tmp_path, monkeypatch, capsys):
    from loftq.cli import main

    (tmp_path / "short.txt").write_text("a few letters, and no more than fit into one window", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    source, options = str(llama.parent / "source"), ["--rank", "4", "--calibration", "short.txt"]
    monkeypatch.setattr("sys.argv", ["loftq", "quantize", source, "--out", "out", *options])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    assert stop.value.code == 0
    first = captured.err.splitlines()[0]
    assert first.startswith("loftq: calibration text 'short.txt' gave 1 window of "), captured.err
    assert "Warning" not in captured.err
    assert " tokens in 1 window with gradients;" in captured.out


def test_live_model(stories_dir, train, evaluation):
    import transformers

    found = {}
    ids = load_file(stories_dir / "tokens.safetensors")["train"].long()[:2048].view(16, 128)
    for calibrate in (False, True):
        model = transformers.AutoModelForCausalLM.from_pretrained(stories_dir, dtype=torch.float32)
        names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
        tokens = loftq.CalibrationTokens.of(ids)
        statistics = loftq.collect_from_model(model, names, tokens, progress=False) if calibrate else None
        quantized = loftq.quantize_model(model, config(train), statistics=statistics, progress=False)
        found[calibrate] = perplexity(quantized, evaluation, window=256).perplexity
    assert found[True] < 0.8 * found[False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "qera", "--no-calibration"], "calibration is off"),
        (["--method", "qera"], "no default calibration text"),
        (["--no-calibration", "--calibration", "x.txt"], "give one"),
        (["--calibration", "missing.txt"], "needs a tokenizer"),
        (["--calibration", "T:nothing"], "nothing"),
        (["--calibration", "T:train", "--statistics", "x"], "give one"),
        (["--statistics", "missing.safetensors"], "does not exist"),
        (["--damping", "2"], "expected a number from 0 to 1"),
        (["--calibration", "T:train", "--method", "lq-lora", "--propagate"], "works on gradients"),
        (["--no-calibration", "--propagate"], "without a calibration text"),
    ],
)
def test_mistakes_get_one_sentence(arguments, message, stories_dir, tmp_path, monkeypatch, capsys):
    tokens = f"{stories_dir}/tokens.safetensors"
    given = [a.replace("T:", f"{tokens}:") for a in arguments]
    monkeypatch.setattr("sys.argv", ["loftq", "quantize", str(stories_dir), "--out", str(tmp_path / "o"), *given])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    *notes, last = error.splitlines()
    assert message in last
    assert all(note.startswith("loftq: calibration text ") for note in notes), "of a short text, before the mistake"
    assert "Traceback" not in error
    assert not (tmp_path / "o").exists()


def test_statistics_of_another_model(stories_dir, train, tmp_path):
    statistics = collect_statistics(stories_dir, config(train), progress=False)
    statistics.source_sha256["model.safetensors"] = "0" * 64
    statistics.save(tmp_path / "s.safetensors")
    with pytest.raises(loftq.SourceError, match="another model"):
        loftq.quantize_checkpoint(
            stories_dir, tmp_path / "o", config(train), statistics=tmp_path / "s.safetensors", progress=False
        )


def test_commands_from_calibration_to_refinement(stories_dir, train, tmp_path):
    """calibrate, plan, quantize with both, refine: each command's output is the next one's input."""

    def run(*arguments: object) -> str:
        done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    statistics, plan, out = tmp_path / "s.safetensors", tmp_path / "plan.json", tmp_path / "out"
    text = ("--calibration", train, "--calibration-samples", 16, "--calibration-length", 128)
    run("calibrate", stories_dir, "--out", statistics, *text)
    run("plan", stories_dir, "--target-bits", 2.5, "--rank", 4, "--statistics", statistics, "--out", plan)
    report = json.loads(
        run("quantize", stories_dir, "--plan", plan, "--rank", 4, "--statistics", statistics, "--out", out, "--json")
    )
    chosen = json.loads(plan.read_text())["modules"]
    assert {m["name"]: m["bits"] for m in report["modules"]} == {n: c["bits"] for n, c in chosen.items()}
    assert len({m["bits"] for m in report["modules"]}) > 1
    numel = sum(m["numel"] for m in report["modules"])
    assert sum(m["bits"] * m["numel"] for m in report["modules"]) <= 2.5 * numel
    refined = json.loads(
        run(
            "refine",
            out,
            "--text",
            train,
            "--samples",
            12,
            "--length",
            64,
            "--epochs",
            1,
            "--stages",
            "model",
            "--json",
        )
    )
    assert refined["after"] <= refined["before"]
    assert "calibrated on" in run("inspect", out)
