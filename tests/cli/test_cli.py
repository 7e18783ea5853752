"""The verbs, from a checkpoint to a merged model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

import loftq
from loftq.cli import app
from loftq.report.record import REPORT

LOFTQ = str(Path(sys.executable).parent / "loftq")
VERBS = (
    "quickstart",
    "quantize",
    "calibrate",
    "plan",
    "refine",
    "train",
    "inspect",
    "evaluate",
    "compare",
    "reproduce",
    "generate",
    "export",
    "bench",
    "data",
)


def invoke(*arguments) -> str:
    """Standard output of a command that succeeds."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def quantized(stories_dir, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "out"
    invoke("quantize", stories_dir, "--out", out, "--bits", "4", "--rank", "8", "--iters", "1")
    return out


@pytest.mark.parametrize("verb", [None, *VERBS])
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help(verb, option):
    text = invoke(*([verb] if verb else []), option)
    assert "Usage: " in text
    assert all(v in text for v in VERBS) or verb


def test_version():
    assert invoke("--version") == f"loftq {loftq.__version__}\n"


def test_help_does_not_wait_for_torch():
    script = "import sys; sys.argv = ['loftq', '--help']\nfrom loftq.cli import main\ntry: main()\n"
    script += "except SystemExit: print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout[-200:]


def test_quantize_writes_what_it_was_told(stories_dir, tmp_path):
    options = ["--bits", "2", "--first-layers-bits", "2:4", "--bits-pattern", "o_proj=8", "--rank-pattern", "mlp.*=2"]
    options += [
        "--rank",
        "4",
        "--iters",
        "0",
        "--published",
        "--exclude-modules",
        "gate_proj",
        "--max-shard-size",
        "90KB",
    ]
    invoke("quantize", stories_dir, "-o", tmp_path / "out", *options)
    report = loftq.QuantizationReport.load(tmp_path / "out")
    modules = {m.name.removeprefix("model.layers."): m for m in report.modules}
    assert len(modules) == 30
    assert {m.codebook for m in report.modules} == {"nf"}
    assert [modules[f"{k}.self_attn.q_proj"].bits for k in range(5)] == [4, 4, 2, 2, 2]
    assert modules["3.self_attn.o_proj"].bits == 8
    assert (modules["0.mlp.up_proj"].rank, modules["0.self_attn.q_proj"].rank) == (2, 4)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1


def test_json_of_quantize_is_pure(stories_dir, tmp_path):
    text = invoke("quantize", stories_dir, "--out", tmp_path / "out", "--rank", "4", "--iters", "1", "--json")
    assert json.loads(text) == json.loads((tmp_path / "out" / REPORT).read_text())


def test_inspect(quantized):
    text = invoke("inspect", quantized)
    assert "35 modules" in text
    assert "model.layers.4.mlp.down_proj" in text
    assert "checked" not in text
    values = json.loads(invoke("inspect", quantized, "--check", "--json"))
    assert values["totals"]["modules"] == 35


@pytest.mark.parametrize("options", [(), ("--memory",)])
def test_check_says_that_all_is_well(options, quantized):
    report = loftq.QuantizationReport.load(quantized)
    text = invoke("inspect", quantized, "--check", *options)
    assert f"checked: all weights were read, and their hash ({report.backbone_sha256[:12]}…)" in text
    values = json.loads(invoke("inspect", quantized, "--check", "--json", *options))
    found = {"backbone_sha256": report.backbone_sha256, "adapter_sha256": report.adapter_sha256}
    assert values["checked"] == found
    assert "checked" not in json.loads(invoke("inspect", quantized, "--json", *options))


@pytest.mark.parametrize("where", [0.3, 0.6, 0.999], ids=lambda w: f"{w:.1%}")
def test_check_finds_a_flipped_bit(where, quantized, tmp_path):
    folder = Path(shutil.copytree(quantized, tmp_path / "out"))
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[int(where * len(data))] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    invoke("inspect", folder)
    with pytest.raises(loftq.LoftQError, match="quantize again"):
        invoke("inspect", folder, "--check")


def test_check_finds_missing_weights(quantized, tmp_path):
    folder = Path(shutil.copytree(quantized, tmp_path / "out"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(loftq.SourceError, match="has neither"):
        invoke("inspect", folder, "--check")


def test_export(quantized, stories_dir, tmp_path):
    text = invoke("export", quantized, "--out", tmp_path / "dense", "--dtype", "float32")
    assert str(tmp_path / "dense") in text
    before, after = (load_file(folder / "model.safetensors") for folder in (stories_dir, tmp_path / "dense"))
    assert before.keys() == after.keys()
    errors = {m.name: m.error for m in loftq.QuantizationReport.load(quantized).modules}
    for name, weight in before.items():
        error = float((after[name] - weight).norm() / weight.norm())
        assert error == pytest.approx(errors.get(name.removesuffix(".weight"), 0), rel=1e-3, abs=1e-6), name
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_executable(stories_dir, tmp_path):
    """quantize, inspect and a second quantize through the installed program, whose stderr is no terminal."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([LOFTQ, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)

    command = [
        "quantize",
        str(stories_dir),
        "--out",
        "my model",
        "--bits",
        "2",
        "--rank",
        "4",
        "--iters",
        "1",
        "--no-calibration",
        "--json",
    ]
    first = run(*command)
    assert first.returncode == 0, first.stderr
    begin, end = first.stderr.splitlines()
    assert begin == "loftq: quantizing: 0 % of 260.0 kweights"
    assert end.startswith("loftq: quantizing: 100 % of 260.0 kweights in ")
    report = json.loads(first.stdout)
    assert (
        report["command"]
        == f"loftq quantize {stories_dir} --out 'my model' --bits 2 --rank 4 --iters 1 --no-calibration --json"
    )
    shown = run("inspect", "my model", "--check", "--json")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert json.loads(shown.stdout) == {
        **report,
        "checked": {n: report[n] for n in ("backbone_sha256", "adapter_sha256")},
    }
    again = run(*command)
    assert json.loads(again.stdout) == report, "a finished run is not repeated"
    assert again.stderr == "loftq: my model is finished already, with these settings; nothing was computed\n"


def test_closed_pipe(quantized):
    """``loftq inspect … | head -1``"""
    command = f"'{LOFTQ}' inspect '{quantized}' --json | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr
