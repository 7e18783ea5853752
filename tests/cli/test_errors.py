"""A user's mistake is one sentence on stderr and exit code 2: no traceback, no output folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loftq.cli import main, parse
from loftq.errors import ConfigError
from loftq.report.record import REPORT

LOFTQ = str(Path(sys.executable).parent / "loftq")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run the command line in this process, in an empty working directory: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["loftq", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run


# options of `quantize SOURCE --out out` -> what the message says
BAD_VALUES = {
    "bits 5": (["--bits", "5"], "bits is 5, expected one of 2, 3, 4, 8"),
    "bits 16": (["--bits", "16"], "bits is 16"),
    "rank 0": (["--rank", "0"], "rank is 0, expected an integer of at least 1"),
    "rank negative": (["-r", "-4"], "rank is -4"),
    "iterations negative": (["--iters", "-1"], "num_iter is -1"),
    "seed negative": (["--seed", "-1"], "seed is -1"),
    "alpha 0": (["--lora-alpha", "0"], "lora_alpha is 0.0, expected a positive number"),
    "alpha nan": (["--lora-alpha", "nan"], "lora_alpha is nan"),
    "dropout 1": (["--lora-dropout", "1"], "lora_dropout is 1.0"),
    "dropout nan": (["--lora-dropout", "nan"], "lora_dropout is nan"),
    "codebook typo": (["--codebook", "loyd"], "did you mean lloyd?"),
    "codebook empty": (["--codebook", ""], "codebook is ''"),
    "method typo": (["--method", "lofq"], "did you mean loftq?"),
    "scale typo": (["--scale", "absmx"], "did you mean absmax?"),
    "scale dtype typo": (["--scale-dtype", "float61"], "did you mean float16?"),
    "svd typo": (["--svd", "exakt"], "did you mean exact?"),
    "block size": (["--block-size", "63"], "block_size is 63, expected one of 32, 64, 128, 256"),
    "published and codebook": (
        ["--published", "--codebook", "nf"],
        "--published already sets the quantizer, but --codebook",
    ),
    "published and scale dtype": (["--published", "--scale-dtype", "float16"], "but --scale-dtype was given too"),
    "first layers one number": (["--first-layers-bits", "16"], "expected LAYERS:BITS such as 16:4"),
    "first layers equals": (["--first-layers-bits", "16=4"], "expected LAYERS:BITS"),
    "first layers text": (["--first-layers-bits", "all:4"], "expected LAYERS:BITS"),
    "first layers superscript": (["--first-layers-bits", "²:4"], "expected LAYERS:BITS"),
    "first layers 0": (["--first-layers-bits", "0:4"], "first_layers_bits[0] (number of layers) is 0"),
    "first layers 5 bits": (["--first-layers-bits", "2:5"], "first_layers_bits[1] (bits) is 5"),
    "bits pattern without number": (["--bits-pattern", "down_proj"], "expected PATTERN=NUMBER"),
    "bits pattern text": (["--bits-pattern", "down_proj=four"], "expected PATTERN=NUMBER"),
    "bits pattern superscript": (["--bits-pattern", "down_proj=²"], "expected PATTERN=NUMBER"),
    "bits pattern endless": (["--bits-pattern", "down_proj=" + "9" * 5000], "expected PATTERN=NUMBER"),
    "bits pattern nameless": (["--bits-pattern", "=4"], "expected PATTERN=NUMBER"),
    "bits pattern 5": (["--bits-pattern", "down_proj=5"], "bits_pattern['down_proj'] is 5"),
    "bits pattern unused": (["--bits-pattern", "query=4"], "'query' of bits_pattern"),
    "bits pattern broken": (["--bits-pattern", "(a=4"], "no regular expression"),
    "rank pattern 0": (["--rank-pattern", "q_proj=0"], "rank_pattern['q_proj'] is 0"),
    "rank pattern negative": (["--rank-pattern", "q_proj=-1"], "expected PATTERN=NUMBER"),
    "targets match nothing": (["--target-modules", "query,value"], "selects no linear layer of LlamaForCausalLM"),
    "targets empty": (["--target-modules", ""], "target_modules is empty"),
    "targets comma": (["--target-modules", ","], "target_modules is empty"),
    "targets broken": (["--target-modules", "*_proj"], "no regular expression"),
    "exclude everything": (["--exclude-modules", ".*"], "selects no linear layer"),
    "tied embedding": (["--quantize-embeddings"], "shares its weight with another module"),
    "size text": (["--max-shard-size", "big"], "expected a size such as 500MB or 5GB"),
    "size 0": (["--max-shard-size", "0GB"], "expected a size"),
    "size below a byte": (["--max-shard-size", "0.1"], "expected a size"),
    "size negative": (["--max-shard-size=-5GB"], "expected a size"),
    "size endless": (["--max-shard-size", "9" * 400], "expected a size"),
    "size binary unit": (["--max-shard-size", "5GiB"], "expected a size"),
    "size empty": (["--max-shard-size", ""], "expected a size"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_value(case, run, stories_dir):
    options, message = BAD_VALUES[case]
    code, out, err = run("quantize", stories_dir, "--out", "out", *options)
    assert (code, out) == (2, ""), err
    assert err.startswith("loftq: "), err
    assert err.count("\n") == 1, err
    assert message in err
    assert os.listdir() == []


USAGE = {
    "bits text": ["quantize", "source", "--out", "out", "--bits", "abc"],
    "rank text": ["quantize", "source", "--out", "out", "--rank", "1e3"],
    "no out": ["quantize", "source"],
    "no source": ["quantize", "--out", "out"],
    "two sources": ["quantize", "a", "b", "--out", "out"],
    "unknown option": ["quantize", "source", "--out", "out", "--bitts", "4"],
    "option without value": ["quantize", "source", "--out"],
    "unknown verb": ["quantise", "source", "--out", "out"],
    "inspect nothing": ["inspect"],
    "export nowhere": ["export", "folder"],
    "generate without prompt": ["generate", "folder"],
    "negative temperature": ["generate", "folder", "-p", "x", "--temperature", "-1"],
    "no new tokens": ["generate", "folder", "-p", "x", "--max-new-tokens", "0"],
}


@pytest.mark.parametrize("case", USAGE)
def test_usage(case, run):
    code, out, err = run(*USAGE[case])
    assert (code, out) == (2, ""), err
    assert "─ Error ─" in err
    assert "Traceback" not in err
    assert os.listdir() == []


WRONG_FOLDERS = {
    "quantize nothing": (["quantize", "no/such/folder", "--out", "out"], "no/such/folder does not exist"),
    "quantize a file": (["quantize", "file", "--out", "out"], "is a file, expected a folder"),
    "quantize an empty folder": (["quantize", "empty", "--out", "out"], "neither model.safetensors"),
    "inspect nothing": (["inspect", "no/such"], f"has no {REPORT}"),
    "inspect a file": (["inspect", "file"], f"has no {REPORT}"),
    "inspect a source": (["inspect", "empty"], f"has no {REPORT}"),
    "inspect a damaged report": (["inspect", "damaged"], "is damaged"),
    "export nothing": (["export", "no/such", "--out", "out"], "no/such"),
    "export a source": (["export", "empty", "--out", "out"], "empty"),
    "export to a dtype": (["export", "empty", "--out", "out", "--dtype", "int8"], "dtype is 'int8'"),
    "evaluate nothing": (["evaluate", "no/such"], "no/such"),
    "evaluate no text": (["evaluate", "empty", "--text", "no.txt"], "text 'no.txt' is no file"),
    "evaluate empty text": (["evaluate", "empty", "--text", "file"], "is empty"),
    "generate nothing": (["generate", "no/such", "-p", "x"], "no/such"),
    "adapter and none": (["evaluate", "empty", "--adapter", "a", "--no-adapter"], "give one"),
}


@pytest.mark.parametrize("case", WRONG_FOLDERS)
def test_wrong_folder(case, run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / REPORT).write_text('{"modules": [')
    (tmp_path / "file").touch()
    arguments, message = WRONG_FOLDERS[case]
    code, out, err = run(*arguments)
    assert (code, out) == (2, ""), err
    assert err.startswith("loftq: ")
    assert err.count("\n") == 1, err
    assert message in err
    assert not (tmp_path / "out").exists()


def test_executable(tmp_path, stories_dir):
    """The same through the installed program."""
    command = [LOFTQ, "quantize", str(stories_dir), "--out", "out", "--codebook", "loyd"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("loftq: codebook is 'loyd'")
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_interrupt(tmp_path, stories_dir):
    """Ctrl-C: exit code 130, one sentence, and the same command continues."""
    command = [LOFTQ, "quantize", str(stories_dir), "--out", "out", "--svd", "exact", "--iters", "100", "--rank", "32"]
    command += ["--no-calibration"]

    def heed_interrupts():  # a shell's background jobs are started with SIGINT ignored, and pass that on
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    ) as process:
        journal = tmp_path / "out.incomplete" / "journal.jsonl"
        deadline = time.monotonic() + 60
        while not (journal.exists() and journal.read_bytes().count(b"\n") > 2) and process.poll() is None:
            assert time.monotonic() < deadline, "not started within a minute"
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
    assert process.returncode == 130, err
    started, sentence = err.splitlines()
    assert started.startswith("loftq: quantizing: 0 % of ")
    assert sentence == "loftq: interrupted; unfinished work continues when the command is run again"
    assert not (tmp_path / "out").exists()
    assert journal.exists()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (None, None),
        ([], None),
        (["all-linear"], "all-linear"),
        (["q_proj"], ("q_proj",)),
        (["q_proj,v_proj"], ("q_proj", "v_proj")),
        (["q_proj v_proj"], ("q_proj", "v_proj")),
        (["q_proj", "v_proj"], ("q_proj", "v_proj")),
        ([r".*\.(q|k)_proj"], r".*\.(q|k)_proj"),
        (["model.layers.0.mlp.up_proj"], ("model.layers.0.mlp.up_proj",)),
    ],
    ids=str,
)
def test_module_patterns(values, expected):
    assert parse.module_patterns(values) == expected


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5e9), ("500MB", 5e8), ("1.5kb", 1500), ("2T", 2e12), ("7", 7), (" 10 MB ", 1e7), ("64B", 64)],
    ids=lambda value: str(value),
)
def test_byte_size(text, size):
    assert parse.byte_size("--max-shard-size", text) == size


def test_patterns_may_contain_an_equals_sign():
    assert parse.int_patterns("--bits-pattern", [r"(?=down)down_proj=4", "q=2"]) == {r"(?=down)down_proj": 4, "q": 2}
    assert parse.first_layers("16:4") == (16, 4)
    with pytest.raises(ConfigError, match="--rank-pattern is 'x'"):
        parse.int_patterns("--rank-pattern", ["x"])


def test_names_are_separated_by_commas_and_never_empty():
    assert parse.names("--metrics", " accuracy, f1,") == ("accuracy", "f1")
    assert parse.names("--metrics", None) is None
    for nothing in ("", ",", " , "):
        with pytest.raises(
            ConfigError, match=f"--labels is {nothing!r}, which names nothing; expected values with commas"
        ):
            parse.names("--labels", nothing)
