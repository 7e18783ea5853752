"""What evaluation and generation refuse, each with one sentence."""

import pytest

import loftq
from loftq.evaluate.models import load_for_inference, load_tokenizer
from tiny import tiny_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    for name in ("llama", "bert", "t5"):
        tiny_model(name).save_pretrained(path / name)
        loftq.quantize_checkpoint(path / name, path / f"{name}-q", loftq.LoftQConfig(bits=4, rank=2, num_iter=0))
    return path


@pytest.mark.parametrize("name", ["bert-q", "t5-q"])
def test_other_models_than_causal_ones(folders, name):
    with pytest.raises(loftq.SourceError, match="expected a causal language model"):
        load_for_inference(folders / name)


@pytest.mark.parametrize("name", ["llama", "llama-q"])
def test_missing_adapter(folders, name):
    with pytest.raises(loftq.SourceError, match=r"nowhere has no adapter_config\.json"):
        load_for_inference(folders / name, adapter=folders / "nowhere")


def test_missing_model(folders):
    with pytest.raises(loftq.SourceError, match="does not exist"):
        load_for_inference(folders / "nowhere")


def test_contradicting_adapter_options(folders):
    with pytest.raises(loftq.ConfigError, match="give one"):
        load_for_inference(folders / "llama-q", adapter=folders / "llama-q/loftq_init", use_adapter=False)


def test_unknown_dtype(folders):
    with pytest.raises(loftq.ConfigError, match="did you mean float16"):
        load_for_inference(folders / "llama", dtype="floot16")


def test_no_tokenizer(folders):
    with pytest.raises(loftq.SourceError, match="has no tokenizer"):
        load_tokenizer(folders / "llama")


def test_a_tokenizer_whose_package_is_not_installed(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise ValueError("`tiktoken` is required to read a `tiktoken` file.")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    monkeypatch.setattr("loftq.evaluate.models._is_installed", lambda name: name != "sentencepiece")
    with pytest.raises(loftq.SourceError, match=r'needs sentencepiece to be read, .*; pip install "loftq\[train\]"$'):
        load_tokenizer(tmp_path)
    monkeypatch.setattr("loftq.evaluate.models._is_installed", lambda name: True)
    with pytest.raises(loftq.SourceError, match="has no tokenizer that transformers can read"):
        load_tokenizer(tmp_path)
