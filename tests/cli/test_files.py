"""Files that are damaged, unreadable, of another kind or in the wrong place: one sentence, before any work is done."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from loftq.cli import main


@pytest.fixture
def said(monkeypatch, capsys, tmp_path):
    """Exit code and what stands on stderr of a command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*arguments: object) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["loftq", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, capsys.readouterr().err

    return run


def one_sentence(code: object, text: str) -> None:
    assert (code, text.count("\n")) == (2, 1), text
    assert text.startswith("loftq: "), text


# command in front of a file's name
WRITERS = {
    "calibrate": ["calibrate", "{source}", "--out"],
    "plan": ["plan", "{source}", "--target-bpw", "3", "--no-calibration", "--out"],
    "plan's errors": ["plan", "{source}", "--target-bpw", "3", "--no-calibration", "--out", "p.json", "--errors"],
    "bench": ["bench", "dequantize", "--quick", "--out"],
}
PLACES = {
    "the current folder": (".", " is a folder, expected a file for "),
    "a folder": ("folder", "folder is a folder, expected a file for "),
    "below a file": ("file/name", "file is a file, expected a folder; choose another name"),
}


@pytest.mark.parametrize(("name", "sentence"), PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("command", WRITERS.values(), ids=WRITERS)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(llama, said, monkeypatch, command, name, sentence):
    for work in ("calibrate.choose.collect_statistics", "plan.errors.measure_checkpoint", "bench.run.Bench.run"):
        monkeypatch.setattr(f"loftq.{work}", lambda *arguments, **options: pytest.fail("worked"))
    Path("folder").mkdir()
    Path("file").touch()
    code, text = said(*(word.format(source=llama.parent / "source") for word in command), name)
    one_sentence(code, text)
    assert sentence in text
    assert sorted(p.name for p in Path().iterdir()) == ["file", "folder"]


def test_rank_0_of_a_plan_is_not_the_default(llama, said):
    code, text = said("plan", llama.parent / "source", "--target-bpw", "3", "--out", "p.json", "--rank", "0")
    one_sentence(code, text)
    assert "rank is 0, expected an integer of at least 1" in text


# what is given for a text -> what is said
TEXTS = {
    "no file": ("no.txt", "'no.txt' is no file, expected a UTF-8 text file"),
    "below no folder": ("a/b/no.text", "'a/b/no.text' is no file"),
    "of nobody": ("~nobody-here/a.txt", "'~nobody-here/a.txt' is no file"),
    "the text itself": ("Once upon a time " * 40, f"'{('Once upon a time ' * 40)[:79]}…' is no file"),
}
READERS = {
    "evaluate": ["evaluate", "{folder}", "--text"],
    "refine": ["refine", "{folder}", "--text"],
    "calibrate": ["calibrate", "{source}", "--out", "s.safetensors", "--calibration"],
    "quantize": ["quantize", "{source}", "--out", "out", "--calibration"],
}


@pytest.mark.parametrize(("name", "sentence"), TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("command", READERS.values(), ids=READERS)
def test_a_text_that_is_no_file_is_not_sought_on_the_hub(llama, said, monkeypatch, command, name, sentence):
    monkeypatch.setattr("loftq.calibrate.text.hub_rows", lambda *arguments, **options: pytest.fail("asked the hub"))
    code, text = said(*(word.format(source=llama.parent / "source", folder=llama) for word in command), name)
    one_sentence(code, text)
    assert sentence in text
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_text_that_may_not_be_read(llama, said, monkeypatch, suffix):
    """As another user's file: permissions do not keep root, who may run the tests, from reading."""
    file = Path(f"secret{suffix}")
    file.write_text("text\n")
    read = Path.read_text

    def refused(path, *arguments, **options):
        if path.name == file.name:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", refused)
    code, text = said("quantize", llama.parent / "source", "--out", "out", "--calibration", file)
    one_sentence(code, text)
    assert f"{file} cannot be read (Permission denied)" in text


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


# file of a quantized folder, what becomes of it -> what is said
DAMAGE = {
    "weights cut short": ("model.safetensors", half, "does not load"),
    "weights empty": ("model.safetensors", lambda content: b"", "does not load"),
    "adapter cut short": ("loftq_init/adapter_model.safetensors", half, "loftq_init"),
    "adapter's config a list": ("loftq_init/adapter_config.json", lambda content: b"[]", "expected a JSON object"),
    "adapter's config empty": ("loftq_init/adapter_config.json", lambda content: b"{}", "loftq_init"),
    "config a list": ("config.json", lambda content: b"[]", "expected a JSON object"),
    "config of no architecture": (
        "config.json",
        lambda content: json.dumps({**json.loads(content), "model_type": "lama"}).encode(),
        "lama",
    ),
    "tokenizer cut short": ("tokenizer.json", half, "has no tokenizer that transformers can read"),
}
USERS = {
    "generate": ["generate", "q", "--prompt", "a"],
    "train": ["train", "run", "--init-from", "q", "--task", "causal", "--data", "a.txt", "--max-steps", "1"],
}


@pytest.mark.parametrize(("file", "damage", "sentence"), DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("command", USERS.values(), ids=USERS)
def test_a_damaged_quantized_folder(llama, said, command, file, damage, sentence):
    shutil.copytree(llama, "q")
    path = Path("q", file)
    path.write_bytes(damage(path.read_bytes()))
    Path("a.txt").write_text("abc " * 50)
    code, text = said(*command)
    one_sentence(code, text)
    assert sentence in text
    assert not Path("run").exists()


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_a_damaged_model(llama, said, command):
    shutil.copytree(llama.parent / "source", "m")
    path = Path("m/model.safetensors")
    path.write_bytes(half(path.read_bytes()))
    Path("a.txt").write_text("abc " * 50)
    code, text = said(command, "m", *(["--text", "a.txt"] if command == "evaluate" else ["--prompt", "a"]))
    one_sentence(code, text)
    assert "m does not load as a causal language model (" in text


def test_an_adapter_of_another_model(llama, said):
    """Of another width: PEFT's own message is a table."""
    shutil.copytree(llama / "loftq_init", "a")
    config = json.loads(Path("a/adapter_config.json").read_text())
    config["r"] += 1
    Path("a/adapter_config.json").write_text(json.dumps(config))
    code, text = said("generate", llama, "--adapter", "a", "--prompt", "a")
    one_sentence(code, text)
    assert "the adapter in a does not load (" in text


def test_a_report_that_is_a_folder(said):
    Path("q/loftq_report.json").mkdir(parents=True)
    code, text = said("inspect", "q")
    one_sentence(code, text)
    assert "loftq_report.json is damaged" in text
