"""``loftq refine`` on a real small model."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import loftq
from loftq.cli import app, main

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = ["--samples", "16", "--length", "64", "--stages", "model", "--epochs", "1", "--batch-tokens", "128"]


@pytest.fixture(scope="module")
def quantized(stories_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("refine-cli") / "q"
    loftq.quantize_checkpoint(stories_dir, out, loftq.LoftQConfig(bits=2, rank=4, num_iter=1), progress=False)
    return out


@pytest.fixture
def text(stories_dir) -> str:
    """The model has no tokenizer: its text is stored as token ids."""
    return f"{stories_dir / 'tokens.safetensors'}:train"


def test_json(quantized, text, tmp_path):
    arguments = [
        "refine",
        quantized,
        "--text",
        text,
        "--out",
        tmp_path / "new",
        *QUICK,
        "--max-tokens",
        "512",
        "--json",
    ]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["changed"]
    assert values["after"] < values["before"]
    assert values["stages"][0]["tokens"] == 512
    assert (values["text"]["length"], values["text"]["windows"], values["text"]["held_out"]) == (64, 16, 2)
    old, new = (load_file(f / "loftq_init" / "adapter_model.safetensors") for f in (quantized, tmp_path / "new"))
    assert old.keys() == new.keys()
    assert not any(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize(
    ("options", "endings"),
    [
        (["--lr", "3e-3"], ("(896 tokens)", "new is refined: ")),
        (["--lr", "10"], (", not kept (384 tokens)", "the adapter in new is as it was")),
    ],
    ids=["better", "not better"],
)
def test_lines(options, endings, quantized, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["refine", str(quantized), "--text", text, "--out", "new", *QUICK, *options])
    assert result.exit_code == 0, result.output
    first, second = result.stdout.splitlines()
    assert first.startswith("model: held-out KL divergence ")
    assert first.endswith(endings[0])
    assert endings[1] in second


MISTAKES = {
    "no text": (["--text", "absent.safetensors:train"], "absent.safetensors"),
    "stages": (["--stages", "head"], "stages is head, expected blocks, model, or both"),
    "loss": (["--loss", "mse"], "loss is 'mse', expected one of kl, rilq"),
    "length": (["--length", "1"], "length is 1, expected an integer of at least 2"),
    "positions": (["--length", "1024", "--samples", "4"], "length is 1024, but the model has 512 positions"),
    "learning rate": (["--lr", "nan"], "learning_rate is nan"),
    "source": (["--source", "/absent/model"], "/absent/model does not exist"),
    "tokenizer": (["--text", "pydoc"], "tokenizer"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case, quantized, text, tmp_path, monkeypatch, capsys):
    options, message = MISTAKES[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["loftq", "refine", str(quantized), "--text", text, "--out", "new", *options])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    assert (stop.value.code, captured.out) == (2, ""), captured.err
    assert message in captured.err
    assert captured.err.startswith("loftq: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:calibration text")
def test_a_text_of_one_window(quantized, tmp_path, monkeypatch, capsys):
    save_file({"few": torch.arange(3, 90)}, tmp_path / "ids.safetensors")
    arguments = ["loftq", "refine", str(quantized), "--text", f"{tmp_path / 'ids.safetensors'}:few", "--length", "64"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "expected at least 2 windows of 2 tokens" in capsys.readouterr().err
