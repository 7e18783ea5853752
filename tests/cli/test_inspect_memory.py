"""``loftq inspect --config`` and ``--memory``: the tables, the JSON, and mistakes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import transformers
from typer.testing import CliRunner

import loftq
from loftq import kernels
from loftq.cli import app, main
from loftq.report.memory import Footprint, measure_footprint
from tiny import tiny_model

MODELS = Path(__file__).resolve().parents[2] / "src" / "loftq" / "recipes" / "models"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("memory") / "source"
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(source) -> Path:
    config = loftq.LoftQConfig(
        bits=2, rank=3, num_iter=0, calibration=None, bits_pattern={"down_proj": 8}, **loftq.PUBLISHED
    )
    loftq.quantize_checkpoint(source, source.parent / "out", config, progress=False)
    return source.parent / "out"


def invoke(*arguments) -> str:
    result = CliRunner().invoke(app, ["inspect", *(str(a) for a in arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


OPTIONS = ("--bits", "2", "--rank", "3", "--published", "--bits-pattern", "down_proj=8")


def test_prediction_is_the_measurement(source, quantized):
    """The options mean what they mean to ``loftq quantize``, for the folder and for its training."""
    predicted = json.loads(invoke("--config", source, *OPTIONS, "--length", "32", "--json"))
    measured = json.loads(invoke(quantized, "--memory", "--length", "32", "--json"))
    assert predicted["memory"] == measured["memory"] == measure_footprint(quantized).to_dict()
    assert predicted["training"] == measured["training"]
    assert predicted["training"].keys() == {"loftq", "lora", "full"}
    assert predicted["training"]["loftq"]["peak"] < predicted["training"]["lora"]["peak"]
    assert (predicted["config"], measured["folder"]) == (str(source), str(quantized))


def test_table(source, monkeypatch):
    text = invoke("--config", source / "config.json", "--bits", "2", "--rank", "3")
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    found = Footprint(**_parts(source))
    for name, part in found.parts.items():
        assert lines[name][1] == f"{part.parameters:,}"
    assert lines["total"][-2:] == ["100.0", "%"]
    assert f"compression ratio {100 * found.compression_ratio:.1f} %" in text
    assert "training memory on cuda: 8 × 64 tokens, float32, AdamW" in text, (
        "train's batch, and the model's 64 positions"
    )
    assert len(lines["peak"]) == 1 + 2 * 3
    assert "workspace" not in lines, "there is none on a GPU"
    monkeypatch.setattr(kernels, "few_tokens", lambda device_type, dtype: 16)  # beyond, a CPU hands products to torch
    text = invoke(
        "--config", source, "--device", "cpu", "--gradient-checkpointing", "--length", "16", "--batch-size", "2"
    )
    assert "training memory on cpu: 2 × 16 tokens, float32, AdamW, gradient checkpointing" in text
    assert "workspace" in text


def _parts(source: Path) -> dict:
    from loftq.checkpoint.source import open_config
    from loftq.report.memory import predict_footprint

    return vars(predict_footprint(open_config(source), loftq.LoftQConfig(bits=2, rank=3)))


# options -> how the predicted backbone differs from that of `--bits 4`, by a count of what is stored
CHANGES = {
    "block size": (["--block-size", "32"], lambda n: n["scales"]),  # two for one of 64, four for two of 100
    "scale dtype": (["--scale-dtype", "float32"], lambda n: n["scales"]),
    "double quantization": (
        ["--double-quant"],
        lambda n: -n["scales"] // 2 + n["matrices"] * 4 + n["groups"] * 4,
    ),
    "bits": (["--bits", "8"], lambda n: n["weights"] // 2 + n["matrices"] * 4 * (256 - 16)),
    "embedding": (["--quantize-embeddings"], lambda n: 96 * (64 // 2 + 2) + 4 * 16),
}


@pytest.mark.parametrize("case", CHANGES)
def test_options_change_what_is_stored(case, source):
    options, difference = CHANGES[case]
    # two layers of q, o (64, 64), k, v (32, 64), gate, up (100, 64), down (64, 100); float16 scales of 64 weights each
    rows, down = 2 * (2 * 64 + 2 * 32 + 2 * 100), 2 * 64
    numbers = {"weights": rows * 64 + down * 100, "matrices": 14, "scales": 2 * (rows + 2 * down), "groups": 14}
    before, after = (
        json.loads(invoke("--config", source, "--length", "8", "--json", *o))["memory"]["backbone"]["nbytes"]
        for o in ([], options)
    )
    assert after - before == difference(numbers)


def test_adapters_in_16_bits(source):
    values = json.loads(invoke("--config", source, "--adapter-dtype", "bfloat16", "--length", "8", "--json"))
    assert values["memory"]["adapters"]["nbytes"] == 2 * values["memory"]["adapters"]["parameters"]


def test_paper_models_by_path():
    text = invoke("--config", MODELS / "deberta-v3-base", "--bits", "2", "--rank", "16", "--length", "8")
    assert "compression ratio 17.2 %, trainable ratio 3.1 %" in text


def test_methods_that_have_a_prediction_are_shown(tmp_path):
    """Dense experts of this model cannot be run on the meta device, packed ones can."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_local_experts": 2,
        "vocab_size": 64,
    }
    config = transformers.MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(tmp_path)
    values = json.loads(invoke("--config", tmp_path, "--rank", "2", "--length", "8", "--json"))
    assert "loftq" in values["training"]
    if values["training_problem"] is not None:  # transformers may learn to run them
        assert values["training_problem"].startswith(tuple({"lora", "full"} - set(values["training"])))


def test_a_model_that_takes_no_tokens_has_a_footprint(tmp_path):
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    config.architectures = ["ViTModel"]
    config.save_pretrained(tmp_path)
    text = invoke("--config", tmp_path, "--rank", "2")
    assert "backbone" in text
    assert "no training memory of loftq: a training step of ViTModel cannot be run on token ids" in text


def test_check_still_reads_the_weights(quantized):
    assert "backbone" in invoke(quantized, "--memory", "--check", "--length", "8")


MISTAKES = {
    "options for a folder": (["{quantized}", "--bits", "2"], "--bits is for --config"),
    "flag for a folder": (["{quantized}", "--quantize-embeddings"], "--quantize-embeddings is for --config"),
    "training without memory": (["{quantized}", "--batch-size", "4"], "--batch-size is for --memory or --config"),
    "check a config": (["--config", "{source}", "--check"], "--check is for a quantized folder"),
    "bits": (["--config", "{source}", "--bits", "5"], "bits is 5, expected one of 2, 3, 4, 8"),
    "published and codebook": (["--config", "{source}", "--published", "--codebook", "nf"], "--codebook was given too"),
    "targets": (["--config", "{source}", "--target-modules", "query"], "selects no linear layer"),
    "first layers": (["--config", "{source}", "--first-layers-bits", "2"], "expected LAYERS:BITS"),
    "dtype": (["--config", "{source}", "--dtype", "float61"], "dtype is 'float61'"),
    "adapter dtype": (["--config", "{source}", "--adapter-dtype", "int8"], "adapter_dtype is 'int8'"),
    "device": (["--config", "{source}", "--device", "gpu"], "device is 'gpu', expected one of cuda, cpu"),
    "batch": (["--config", "{source}", "--batch-size", "0"], "batch_size is 0"),
    "length": (["--config", "{source}", "--length", "65"], "length is 65, but the model has positions for 64 tokens"),
    "no config": (["--config", "no/such/config.json"], "does not exist, expected a config.json"),
    "quantized config": (["--config", "{quantized}"], "is quantized already"),
    "memory of a source": (["{source}", "--memory"], "has no loftq_report.json"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case, source, quantized, monkeypatch, capsys):
    arguments, message = MISTAKES[case]
    arguments = [a.format(source=source, quantized=quantized) for a in arguments]
    monkeypatch.setattr(sys, "argv", ["loftq", "inspect", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, ""), err
    assert err.startswith("loftq: "), err
    assert err.count("\n") == 1, err
    assert message in err


@pytest.mark.parametrize("arguments", [[], ["folder", "--config", "c"]], ids=["neither", "both"])
def test_one_of_folder_and_config(arguments):
    result = CliRunner().invoke(app, ["inspect", *arguments])
    assert result.exit_code == 2
    assert "give a quantized folder, or --config" in " ".join(result.output.replace("│", " ").split())
