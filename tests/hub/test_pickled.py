"""Pickled weights are never opened: not a model's, not an adapter's, whichever verb is asked."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import loftq
from loftq.errors import SourceError
from loftq.evaluate.models import load_for_inference
from loftq.hub.pretrained import load_pretrained
from small import quantized_llama
from words import write_rows

PICKLED = r"has only pickled weights \({}\), which are never opened because unpickling runs code; convert them to"


def pickle_weights(folder: Path, name: str, pickled: str) -> None:
    torch.save(load_file(folder / name), folder / pickled)
    (folder / name).unlink()


@pytest.fixture
def refuse_unpickling(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr("peft.utils.save_and_load.torch_load", refuse)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """``q``, a quantized folder; ``bin``, its source with pickled weights; ``rows.jsonl``, something to train on."""
    path = tmp_path_factory.mktemp("pickled")
    quantized_llama(path)
    shutil.copytree(path / "source", path / "bin")
    pickle_weights(path / "bin", "model.safetensors", "pytorch_model.bin")
    write_rows(path / "rows.jsonl", [{"prompt": "1+1=", "completion": "2"}] * 4)
    return path


TRAIN = ("--task", "completion", "--data", "rows.jsonl", "--max-steps", "1")


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", "bin", "--no-calibration", "--out", "q2"),
        ("evaluate", "bin", "--max-tokens", "20"),
        ("evaluate", "bin", "--task", "completion", "--data", "rows.jsonl"),
        ("generate", "bin", "--prompt", "1", "--max-new-tokens", "1"),
        ("train", "run", "--model", "bin", "--method", "lora", *TRAIN),
        ("train", "run", "--model", "bin", "--method", "full", *TRAIN),
    ],
    ids=lambda a: "-".join(w for w in a if w.isalpha()),
)
def test_a_model(folder, arguments, monkeypatch, refuse_unpickling):
    from loftq.cli import app

    monkeypatch.chdir(folder)
    with pytest.raises(SourceError, match="^bin " + PICKLED.format(r"pytorch_model\.bin")):
        app(list(arguments), standalone_mode=False)
    assert not Path("run").exists()


def test_a_quantized_folder(folder, tmp_path, refuse_unpickling):
    backbone = Path(shutil.copytree(folder / "q", tmp_path / "q"))
    pickle_weights(backbone, "model.safetensors", "pytorch_model.bin")
    with pytest.raises(SourceError, match=PICKLED.format(r"pytorch_model\.bin")):
        loftq.load(backbone)


def test_an_adapter(folder, tmp_path, refuse_unpickling):
    adapter = Path(shutil.copytree(folder / "q" / "loftq_init", tmp_path / "adapter"))
    pickle_weights(adapter, "adapter_model.safetensors", "adapter_model.bin")
    with pytest.raises(SourceError, match=PICKLED.format(r"adapter_model\.bin")):
        loftq.load(folder / "q", adapter=adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(SourceError, match=r"adapter has neither adapter_model\.safetensors"):
        loftq.load(folder / "q", adapter=adapter)


def test_an_adapter_beside_a_model(folder, tmp_path, refuse_unpickling):
    """transformers puts it on unasked."""
    shutil.copytree(folder / "source", tmp_path / "both")
    shutil.copytree(folder / "q" / "loftq_init", tmp_path / "both", dirs_exist_ok=True)
    pickle_weights(tmp_path / "both", "adapter_model.safetensors", "adapter_model.bin")
    with pytest.raises(SourceError, match=PICKLED.format(r"adapter_model\.bin")):
        load_for_inference(tmp_path / "both")


def test_a_hub_repository():
    asked = {}

    class Auto:
        @staticmethod
        def from_pretrained(model, **options):
            asked.update(options)
            raise OSError(
                f"{model} does not appear to have a file named model.safetensors or model.safetensors.index.json"
            )

    with pytest.raises(
        SourceError, match=r"^owner/model has no safetensors on the hub at the revision v2, .* --revision"
    ):
        load_pretrained(Auto, "owner/model", revision="v2")
    assert asked == {"use_safetensors": True, "trust_remote_code": False, "revision": "v2"}


def test_a_hub_repository_to_quantize(tmp_path, monkeypatch):
    """Only safetensors and small files are fetched, so that the folder is one without weights."""
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: str(tmp_path))
    with pytest.raises(SourceError, match=r"^owner/model has no safetensors on the hub at the revision main"):
        loftq.quantize_checkpoint("owner/model", tmp_path / "q", loftq.LoftQConfig(bits=4, rank=2), progress=False)


@pytest.fixture
def asked(folder, monkeypatch) -> list:
    """The classes and revisions that the hub id owner/model is loaded with, from a folder."""
    asked: list = []

    def at_a_revision(cls):
        before = cls.from_pretrained

        def from_pretrained(model, **options):
            if model == "owner/model":
                asked.append((cls.__name__, options["revision"]))
                model = folder / "source"
            return before(model, **options)

        monkeypatch.setattr(cls, "from_pretrained", from_pretrained)

    for cls in (tf.AutoConfig, tf.AutoTokenizer, tf.AutoModelForCausalLM):
        at_a_revision(cls)
    return asked


def test_a_revision_reaches_whatever_is_loaded(folder, tmp_path, asked):
    """A run on a hub id: config, tokenizer and weights are of the revision named, when it is trained and when it is loaded."""
    from loftq.data.prepare import DataSettings
    from loftq.errors import ConfigError
    from loftq.finetune.load import load_run
    from loftq.finetune.run import train
    from loftq.finetune.settings import TrainSettings

    data = DataSettings("completion", str(folder / "rows.jsonl"))
    settings = TrainSettings(data, method="lora", max_steps=1, rank=2)
    record = train(tmp_path / "run", settings, model="owner/model", revision="v2", progress=False)
    assert record.revision == "v2"
    names = {"AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"}
    assert set(asked) == {(name, "v2") for name in names}
    asked.clear()
    load_run(tmp_path / "run")
    assert set(asked) == {("AutoModelForCausalLM", "v2")}
    with pytest.raises(ConfigError, match=r"the revision v2 is of the folder .*source, expected one of a hub id"):
        train(tmp_path / "other", settings, model=str(folder / "source"), revision="v2", progress=False)


def test_a_revision_reaches_what_is_measured_or_continued(folder, asked):
    from typer.testing import CliRunner

    from loftq.cli import app
    from loftq.errors import ConfigError

    text = str(folder / "rows.jsonl")
    measure = ["--task", "completion", "--data", text, "--metrics", "perplexity"]
    for words in (
        ["evaluate", "--text", text],
        ["evaluate", *measure],
        ["generate", "-p", "a", "--max-new-tokens", "2"],
    ):
        asked.clear()
        done = CliRunner().invoke(app, [words[0], "owner/model", "--revision", "v2", *words[1:]])
        assert done.exit_code == 0, (done.output, done.exception)
        assert set(asked) >= {("AutoTokenizer", "v2"), ("AutoModelForCausalLM", "v2")}
        assert {revision for _, revision in asked} == {"v2"}
        done = CliRunner().invoke(app, [words[0], str(folder / "source"), "--revision", "v2", *words[1:]])
        assert isinstance(done.exception, ConfigError)
        assert "the revision v2 is of the folder" in str(done.exception)
