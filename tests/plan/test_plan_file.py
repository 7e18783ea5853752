"""The plan file: readable, checked when read, refused where it does not belong."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from loftq import LoftQConfig, quantize_checkpoint
from loftq.errors import ConfigError, LoftQError, OutputError, SourceError
from loftq.plan.file import FORMAT, Choice, PlanFile, apply_plan, load_plan
from loftq.plan.targets import plan_modules
from tiny import tiny_model

MODEL = tiny_model("llama")
CONFIG = LoftQConfig(bits=4, rank=8)
PLANS = plan_modules(MODEL, CONFIG)
SHA = {"model.safetensors": "ab" * 32}
QUANTIZER = {"codebook": "lloyd", "scale": "search", "scale_dtype": "float16", "double_quant": False}


def plan(**changes) -> PlanFile:
    widths = (2, 3, 4, 8)
    modules = {name: Choice(widths[k % 4], 32 if k % 2 else 64, 4 + k) for k, name in enumerate(PLANS)}
    return PlanFile(**{"modules": modules, "source": {"name": "m", "sha256": SHA}, "quantizer": QUANTIZER, **changes})


def saved(tmp_path: Path, change) -> Path:
    """A plan file whose JSON ``change`` has been applied to."""
    path = tmp_path / "plan.json"
    plan().save(path)
    values = json.loads(path.read_text())
    path.write_text(json.dumps(change(values) or values))
    return path


def test_a_plan_survives_its_file(tmp_path):
    path = tmp_path / "plan.json"
    original = plan(target={"bits_per_weight": 2.5}, predicted={"plan": {"objective": 1.5}}, command="loftq plan")
    original.save(path)
    assert load_plan(path) == original
    assert load_plan(str(path)) == original
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_the_file_has_one_module_a_line(tmp_path):
    plan().save(tmp_path / "plan.json")
    lines = (tmp_path / "plan.json").read_text().splitlines()
    for name, choice in plan().modules.items():
        expected = {"bits": choice.bits, "block_size": choice.block_size, "rank": choice.rank}
        (line,) = [line for line in lines if f'"{name}"' in line]
        assert json.loads("{" + line.rstrip(",") + "}") == {name: expected}


def test_an_edited_file_counts(tmp_path):
    name = next(iter(PLANS))
    path = saved(tmp_path, lambda v: v["modules"][name].update(bits=3, rank=17))
    assert apply_plan(PLANS, path)[name].spec.bits == 3
    assert apply_plan(PLANS, path)[name].rank == 17


def test_a_plan_changes_bits_block_size_and_rank_alone():
    applied = apply_plan(PLANS, plan(), source_sha256=SHA)
    assert list(applied) == list(PLANS)
    for (name, choice), module in zip(plan().modules.items(), applied.values(), strict=True):
        before = PLANS[name]
        assert (module.name, module.kind, module.shape) == (before.name, before.kind, before.shape)
        assert (module.spec.bits, module.spec.block_size, module.rank) == (choice.bits, choice.block_size, choice.rank)
        assert module.spec.replace(bits=before.spec.bits, block_size=before.spec.block_size) == before.spec


NAME = next(iter(PLANS))

# change to the file's JSON -> (error, what the message says)
DAMAGE = {
    "another kind of file": (lambda v: v.update(format="x"), SourceError, f'"format": "{FORMAT}"'),
    "newer version": (lambda v: v.update(version=9), SourceError, "version 9, expected 1"),
    "no modules": (lambda v: v.update(modules={}), SourceError, "lists no modules"),
    "modules are a list": (lambda v: v.update(modules=[1]), SourceError, "lists no modules"),
    "a list": (lambda v: [1], SourceError, "is no plan"),
    "5 bits": (
        lambda v: v["modules"][NAME].update(bits=5),
        ConfigError,
        f"{NAME}: bits is 5, expected one of 2, 3, 4, 8",
    ),
    "bits as text": (lambda v: v["modules"][NAME].update(bits="4"), ConfigError, "bits is '4'"),
    "block of 48": (lambda v: v["modules"][NAME].update(block_size=48), ConfigError, "block_size is 48"),
    "rank 0": (lambda v: v["modules"][NAME].update(rank=0), ConfigError, "rank is 0"),
    "rank missing": (lambda v: v["modules"][NAME].pop("rank") and None, ConfigError, f"lacks rank of {NAME}"),
    "typo": (lambda v: v["modules"][NAME].update(bit=4), ConfigError, "did you mean 'bits'?"),
    "a number": (lambda v: v["modules"].update({NAME: 4}), ConfigError, f"gives {NAME} 4, expected an object"),
    "unknown setting": (lambda v: v.update(tagret={}), ConfigError, "did you mean 'target'?"),
    "source is text": (lambda v: v.update(source="m"), SourceError, "'m' as source"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_refused(case, tmp_path):
    change, kind, message = DAMAGE[case]
    with pytest.raises(kind) as caught:
        load_plan(saved(tmp_path, change))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", None], ids=["empty", "cut off", "no text", "absent"])
def test_what_is_no_json_is_refused(content, tmp_path):
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SourceError, match="cannot be read as a plan"):
        load_plan(path)


def refused(change, **options) -> str:
    with pytest.raises(LoftQError) as caught:
        apply_plan(PLANS, change, **options)
    return str(caught.value)


def test_plans_for_something_else_are_refused():
    modules = plan().modules
    assert "has 'lm_head' (and 0 more)" in refused(plan(modules={**modules, "lm_head": Choice(4, 64, 8)}))
    fewer = {n: c for n, c in modules.items() if n != NAME}
    assert f"lacks {NAME!r} (and 0 more of {len(PLANS)}" in refused(plan(modules=fewer))
    other = refused(plan(), source_sha256={"model.safetensors": "cd" * 32})
    assert other.startswith("the plan was made for m, whose model.safetensors differs")
    more_files = refused(plan(), source_sha256={**SHA, "more.safetensors": "ef" * 32})
    assert "whose more.safetensors differs" in more_files
    assert "made for scale_dtype=float32" in refused(plan(quantizer={**QUANTIZER, "scale_dtype": "float32"}))


def test_a_plan_without_digests_fits_any_model():
    apply_plan(PLANS, plan(source={}), source_sha256={"model.safetensors": "cd" * 32})


def test_a_finished_folder_is_not_that_of_an_edited_plan(tmp_path):
    """The plan's path is the same, so the settings are, but not what they ask for."""
    path = tmp_path / "plan.json"
    MODEL.save_pretrained(tmp_path / "source")
    plan(source={}).save(path)
    config = CONFIG.replace(plan=str(path), calibration=None, num_iter=1)
    run = partial(quantize_checkpoint, tmp_path / "source", tmp_path / "q", config, progress=False)
    run()
    run()
    values = json.loads(path.read_text())
    values["modules"][NAME]["rank"] += 1
    path.write_text(json.dumps(values))
    with pytest.raises(OutputError, match="holds a finished quantization with other settings"):
        run()


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        plan().save(tmp_path / "absent" / "plan.json")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    plan().save(path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OutputError, match="No space left"):
        plan(rule="first-layers").save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
