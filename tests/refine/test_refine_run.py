"""Refining a real small model: it helps, it never harms, and an interruption changes nothing."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import loftq
from loftq.errors import ConfigError, OutputError, SourceError
from loftq.hub.backbone import adapter_sha256, backbone_sha256, check_adapter
from loftq.refine import RefinementReport, RefineSettings, folder, refine, run, student
from loftq.refine.folder import UNREFINED
from loftq.refine.record import REFINEMENT
from loftq.refine.state import work_folder
from loftq.report.record import REPORT
from tiny import densify, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = RefineSettings(batch_tokens=128, block_epochs=1, epochs=1, dtype="float32", learning_rate=3e-3)


class Crash(BaseException):
    """No ``except Exception`` may catch it, as none catches a kill."""


@pytest.fixture(scope="module")
def quantized(stories_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("refine") / "q"
    loftq.quantize_checkpoint(stories_dir, out, loftq.LoftQConfig(bits=2, rank=4, num_iter=1), progress=False)
    return out


@pytest.fixture(scope="module")
def ids(stories_dir):
    return load_file(stories_dir / "tokens.safetensors")["train"][: 24 * 64].long().view(24, 64)


@pytest.fixture
def out(quantized, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(quantized, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def every_step(monkeypatch):
    """The state is saved whenever it could be."""
    monkeypatch.setattr(run, "SAVE_SECONDS", 0.0)


def contents(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def adapter_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "loftq_init" / "adapter_model.safetensors")


@torch.no_grad()
def divergence(path: Path, source: Path, ids: torch.Tensor) -> float:
    """The mean divergence, from the logits of both models as any user would compute them."""
    from transformers import AutoModelForCausalLM

    p = torch.log_softmax(AutoModelForCausalLM.from_pretrained(source)(ids).logits.double(), -1)
    q = torch.log_softmax(loftq.load(path)(ids).logits.double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_rate_that_is_too_high_is_lowered_until_it_helps(out, ids):
    options = {"stages": ("model",), "learning_rate": 0.3, "epochs": 2, "batch_tokens": 64}
    report = refine(out, text=ids, settings=QUICK, progress=False, **options)
    curve = report.stages[0].curve
    print(report.before, curve)
    assert curve[0]["held_out"] is None or curve[0]["held_out"] > report.before, "the test's rate is not too high"
    assert report.changed
    assert report.after < 0.95 * report.before
    lowest = report.before
    for entry, following in itertools.pairwise(curve):
        better = entry["held_out"] is not None and entry["held_out"] < lowest
        lowest = entry["held_out"] if better else lowest
        assert following["learning_rate"] == pytest.approx(entry["learning_rate"] * (1 if better else 1 / 3))


@pytest.mark.parametrize(
    "options",
    [{}, {"stages": ("model",), "loss": "rilq"}, {"stages": ("model",), "scales": True}, {"dtype": "bfloat16"}],
    ids=["both stages", "rilq", "scales", "bfloat16"],
)
def test_it_helps_and_says_how_much(options, out, stories_dir, ids):
    before = contents(out)
    report = refine(out, text=ids, settings=QUICK, progress=False, command="the command", **options)
    assert report == RefinementReport.load(out)
    assert report.changed
    assert all(stage.kept for stage in report.stages), report.stages
    assert report.after < 0.8 * report.before, (report.before, report.after)
    assert report.text["held_out"] == 3
    measured = divergence(out, stories_dir, ids[-3:])
    tolerance = 0.02 if "dtype" in options else 1e-4  # bfloat16 rounds hidden states to 3 digits
    assert report.after == pytest.approx(measured, rel=tolerance), measured

    quantization = loftq.QuantizationReport.load(out)
    assert quantization.adapter_sha256 == report.adapter_sha256 == adapter_sha256(out)
    assert (
        quantization.backbone_sha256
        == report.backbone_sha256
        == backbone_sha256(out)
        == check_adapter(out, out / "loftq_init")
    )
    after = contents(out)
    changed = {name for name in before if after[name] != before[name]}
    expected = {"loftq_init/adapter_model.safetensors", REPORT}
    if options.get("scales"):
        expected |= {"model.safetensors", "loftq_init/adapter_config.json"}
        assert UNREFINED not in os.listdir(out)
        old, new = load_file(stories_dir / "model.safetensors"), load_file(out / "model.safetensors")
        assert old.keys() <= new.keys()
    else:
        assert after[f"{UNREFINED}/adapter_model.safetensors"] == before["loftq_init/adapter_model.safetensors"]
    assert changed == expected
    assert not work_folder(out).exists()


def test_only_scales_of_the_backbone_change(out, quantized, ids):
    refine(out, text=ids, settings=QUICK, progress=False, stages=("model",), scales=True)
    old, new = load_file(quantized / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if name.endswith("weight_scale")}


def test_recorded_weight_error_is_that_of_the_result(out, stories_dir, ids):
    from transformers import AutoModelForCausalLM

    refine(out, text=ids, settings=QUICK, progress=False, stages=("model",), scales=True)
    source = AutoModelForCausalLM.from_pretrained(stories_dir)
    result = densify(AutoModelForCausalLM.from_pretrained(stories_dir), loftq.load(out))
    for module in loftq.QuantizationReport.load(out).modules:
        weight = source.get_submodule(module.name).weight
        error = float((weight - result.get_submodule(module.name).weight).norm() / weight.norm())
        assert module.error == pytest.approx(error, rel=1e-4), module.name


def test_each_block_ends_no_worse_than_it_began(out, ids):
    report = refine(out, text=ids, settings=QUICK, progress=False, stages=("blocks",))
    (stage,) = report.stages
    assert [entry["block"] for entry in stage.curve] == [f"model.layers.{i}" for i in range(5)]
    assert all(entry["after"] < entry["before"] for entry in stage.curve), stage.curve


@pytest.mark.parametrize("learning_rate", [10.0, 1e30], ids=["10", "beyond float32"])
@pytest.mark.parametrize("scales", [False, True], ids=["adapters", "scales"])
def test_never_worse(learning_rate, scales, out, ids):
    before = contents(out)
    options = {"learning_rate": learning_rate, "scales_learning_rate": learning_rate, "scales": scales}
    report = refine(out, text=ids, settings=QUICK, progress=False, **options)
    assert not report.changed
    assert report.after == report.before
    assert [stage.kept for stage in report.stages] == [False, False]
    after = contents(out)
    assert json.loads(after.pop(REFINEMENT))["changed"] is False
    assert after == before
    assert not work_folder(out).exists()


def test_another_folder(quantized, tmp_path, ids):
    before = contents(quantized)
    report = refine(quantized, text=ids, settings=QUICK, progress=False, out=tmp_path / "new", stages=("model",))
    assert report.changed
    assert contents(quantized) == before
    assert os.path.samefile(quantized / "model.safetensors", tmp_path / "new" / "model.safetensors")
    config = json.loads((tmp_path / "new" / "loftq_init" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "new")
    assert adapter_sha256(tmp_path / "new") == loftq.QuantizationReport.load(tmp_path / "new").adapter_sha256
    loftq.load(tmp_path / "new")
    with pytest.raises(OutputError, match="is not empty"):
        refine(quantized, text=ids, settings=QUICK, progress=False, out=tmp_path / "new")


def stop_at(monkeypatch, owner, name: str, call: int) -> None:
    """A kill in front of the given call."""
    original, calls = getattr(owner, name), []

    def function(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            raise Crash
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, function)


@pytest.mark.parametrize("scales", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["adapters", "scales"])
def test_interrupted_is_the_same_as_not(scales, out, tmp_path, ids, every_step):
    settings = dataclasses.replace(QUICK, scales=scales, epochs=2)
    expected = refine(out, text=ids, settings=settings, progress=False, out=tmp_path / "whole")
    crashes = 0
    for place in [
        (run.BlockStage, "_tune", 3),
        (run.ModelStage, "_rows", 2),
        (run.ModelStage, "_rows", 7),
        (run.Distance, "held_out", 4),
        (run, "write_refined", 1),
        (folder, "_to_disk", 1),
    ]:
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, *place)
            with pytest.raises(Crash):
                refine(out, text=ids, settings=settings, progress=False)
            crashes += 1
        assert adapter_sha256(out) == loftq.QuantizationReport.load(out).adapter_sha256
        assert REFINEMENT not in os.listdir(out)
    report = refine(out, text=ids, settings=settings, progress=False)
    assert crashes == 6
    assert report.after == pytest.approx(expected.after, rel=1e-6)
    assert [(s.name, s.steps, s.tokens, s.kept) for s in report.stages] == [
        (s.name, s.steps, s.tokens, s.kept) for s in expected.stages
    ]
    ours, theirs = adapter_of(out), adapter_of(tmp_path / "whole")
    worst = max(float((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max()) for n in theirs)
    assert worst < 1e-6, f"{worst:.1e}"
    assert backbone_sha256(out) == backbone_sha256(tmp_path / "whole")


def test_steps_already_done_are_not_done_again(out, ids, every_step):
    steps = []
    for last in (4, None):
        with pytest.MonkeyPatch.context() as patch:
            original = run.ModelStage._rows

            def rows(self, step, last=last, original=original):
                if step == last:
                    raise Crash
                steps.append(step)
                return original(self, step)

            patch.setattr(run.ModelStage, "_rows", rows)
            if last is None:
                refine(out, text=ids, settings=QUICK, progress=False, stages=("model",))
            else:
                with pytest.raises(Crash):
                    refine(out, text=ids, settings=QUICK, progress=False, stages=("model",))
    assert steps == list(range(11))


@pytest.mark.parametrize("replaced", [1, 2], ids=["before the new one has its name", "before cleaning up"])
def test_kill_while_the_folder_changes_places(replaced, out, ids, monkeypatch):
    """Absent or whole, never mixed; the next run finishes the move without computing anything."""
    settings = dataclasses.replace(QUICK, stages=("model",), scales=True)
    before = loftq.QuantizationReport.load(out).backbone_sha256
    moves = []
    original = os.replace

    def replace(source, destination):
        original(source, destination)
        if Path(source) == out or Path(destination) == out:
            moves.append(destination)
            if len(moves) == replaced:
                raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Crash):
            refine(out, text=ids, settings=settings, progress=False)
    assert out.exists() == (replaced == 2)
    with monkeypatch.context() as patch:
        patch.setattr(run, "_Refinement", None)
        report = refine(out, text=ids, settings=settings, progress=False)
    assert report.changed
    assert backbone_sha256(out) == report.backbone_sha256 == check_adapter(out, out / "loftq_init") != before
    assert not work_folder(out).exists()


def test_other_settings_do_not_continue_an_unfinished_run(out, ids, every_step, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, run.ModelStage, "_rows", 3)
        with pytest.raises(Crash):
            refine(out, text=ids, settings=QUICK, progress=False)
    with pytest.raises(OutputError, match="unfinished refinement with another settings"):
        refine(out, text=ids, settings=QUICK, progress=False, learning_rate=1e-4)
    with pytest.raises(OutputError, match="unfinished refinement with another text"):
        refine(out, text=ids.flip(0), settings=QUICK, progress=False)
    assert refine(out, text=ids.flip(0), settings=QUICK, progress=False, resume=False).changed


def test_hidden_states_may_lie_on_disk(out, quantized, tmp_path, ids, monkeypatch):
    refine(quantized, text=ids, settings=QUICK, progress=False, out=tmp_path / "memory")
    monkeypatch.setattr(run, "STATES_BYTES", 0)
    refine(quantized, text=ids, settings=QUICK, progress=False, out=tmp_path / "disk")
    assert adapter_sha256(tmp_path / "memory") == adapter_sha256(tmp_path / "disk")


def test_packed_and_dense_backbones_give_the_same(quantized, tmp_path, ids, monkeypatch):
    """The dense copy is kept where memory allows; otherwise the matrix is dequantized for each product."""
    options = {"text": ids, "settings": QUICK, "progress": False, "stages": ("model",), "scales": True}
    dense = refine(quantized, out=tmp_path / "dense", **options)
    monkeypatch.setattr(student, "free_bytes", lambda device: 0)
    packed = refine(quantized, out=tmp_path / "packed", **options)
    assert packed.after == pytest.approx(dense.after, rel=1e-4)


def test_text_that_the_full_precision_model_writes(out):
    settings = dataclasses.replace(QUICK, samples=12, length=64, stages=("model",))
    report = refine(out, text="self", settings=settings, progress=False)
    assert report.text["windows"] == 12
    assert report.changed


def test_padding_counts_for_nothing(out, stories_dir, ids):
    """Held-out windows of which half is padding: as if the padding were not there."""
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 40:] = False
    text = SimpleNamespace(ids=torch.where(mask, ids, 0), mask=mask, name="padded", sha256="")
    report = refine(out, text=text, settings=QUICK, progress=False)
    assert report.changed
    assert report.after == pytest.approx(divergence(out, stories_dir, ids[-3:, :40]), rel=1e-4)


def test_encoder(tmp_path):
    model = tiny_model("bert")
    model.save_pretrained(tmp_path / "source")
    loftq.quantize_checkpoint(tmp_path / "source", tmp_path / "q", loftq.LoftQConfig(bits=2, rank=2), progress=False)
    ids = torch.randint(3, 96, (24, 16), generator=torch.Generator().manual_seed(1))
    report = refine(tmp_path / "q", text=ids, settings=QUICK, progress=False)
    assert report.metric == "hidden"
    assert report.changed
    with torch.no_grad():
        full = model(ids[-3:]).last_hidden_state
        ours = loftq.load(tmp_path / "q")(ids[-3:]).last_hidden_state
    error = float((ours - full).square().mean() / full.var(correction=0))
    assert report.after == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "opt", "qwen2", "mistral", "deberta-v2"])
def test_architectures(name, tmp_path):
    tiny_model(name).save_pretrained(tmp_path / "source")
    loftq.quantize_checkpoint(tmp_path / "source", tmp_path / "q", loftq.LoftQConfig(bits=2, rank=2), progress=False)
    ids = torch.randint(3, 96, (24, 16), generator=torch.Generator().manual_seed(1))
    report = refine(tmp_path / "q", text=ids, settings=QUICK, progress=False)
    assert report.changed
    if report.metric == "kl":
        assert report.after == pytest.approx(divergence(tmp_path / "q", tmp_path / "source", ids[-3:]), rel=1e-4)


def test_quantized_embedding_and_head(tmp_path):
    model = tiny_model("llama")  # its output layer is a matrix of its own
    model.save_pretrained(tmp_path / "source")
    config = loftq.LoftQConfig(
        bits=2, rank=2, quantize_embeddings=True, target_modules=("q_proj", "down_proj", "lm_head")
    )
    loftq.quantize_checkpoint(tmp_path / "source", tmp_path / "q", config, progress=False)
    old = adapter_of(tmp_path / "q")
    ids = torch.randint(3, 96, (24, 16), generator=torch.Generator().manual_seed(1))
    report = refine(tmp_path / "q", text=ids, settings=QUICK, progress=False, stages=("model",))
    assert report.changed
    assert report.after == pytest.approx(divergence(tmp_path / "q", tmp_path / "source", ids[-3:]), rel=1e-3)
    new = adapter_of(tmp_path / "q")
    unchanged = {name for name in old if torch.equal(old[name], new[name])}
    assert unchanged == {f"base_model.model.lm_head.lora_{x}.weight" for x in "AB"}


def test_mistakes(quantized, stories_dir, tmp_path, ids):
    def fails(error: type, message: str, folder=quantized, source=None, **options):
        with pytest.raises(error, match=message):
            refine(
                folder, source, **{"text": ids, "settings": QUICK, "progress": False, "out": tmp_path / "x", **options}
            )
        assert not (tmp_path / "x").exists()
        assert not work_folder(tmp_path / "x").exists()

    fails(SourceError, "no quantized folder of loftq", folder=stories_dir)
    other = tmp_path / "other"
    shutil.copytree(stories_dir, other)
    with open(other / "model.safetensors", "r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"\x01\x02\x03\x04")
    fails(SourceError, "give the model that was quantized", source=other)
    fails(SourceError, "does not exist", source=tmp_path / "absent" / "model")
    fails(SourceError, "at least 2 windows", text=ids[:1])
    fails(ConfigError, "has 512 positions", text=ids.flatten()[:1200].view(2, 600))
    fails(ConfigError, "stages is model, blocks", stages=("model", "blocks"))
    fails(ConfigError, "stages is empty", stages=())
    fails(ConfigError, "did you mean rilq", loss="rilk")
    fails(ConfigError, "learning_rate is 0", learning_rate=0)
    fails(ConfigError, "holdout is 1", holdout=1)


def test_scales_in_8_bits_cannot_be_tuned(stories_dir, tmp_path, ids):
    config = loftq.LoftQConfig(bits=4, rank=2, num_iter=1, double_quant=True)
    loftq.quantize_checkpoint(stories_dir, tmp_path / "q", config, progress=False)
    with pytest.raises(ConfigError, match="scales in 8 bits"):
        refine(tmp_path / "q", text=ids, settings=QUICK, progress=False, scales=True)
    assert refine(tmp_path / "q", text=ids, settings=QUICK, progress=False, stages=("model",)).changed


def test_a_source_that_moved(quantized, stories_dir, tmp_path, ids):
    shutil.copytree(quantized, tmp_path / "q")
    path = tmp_path / "q" / REPORT
    values = json.loads(path.read_text())
    values["source"]["name"] = str(tmp_path / "gone")
    path.write_text(json.dumps(values))
    with pytest.raises(SourceError, match="name it with --source"):
        refine(tmp_path / "q", text=ids, settings=QUICK, progress=False)
    assert refine(tmp_path / "q", stories_dir, text=ids, settings=QUICK, progress=False, stages=("model",)).changed
