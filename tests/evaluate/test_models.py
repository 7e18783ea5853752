"""What evaluation and generation refuse, each with one sentence."""

import pytest
import transformers as tf

import loftq
from loftq.evaluate.models import check_causal, load_for_inference, load_tokenizer
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


@pytest.mark.parametrize("is_decoder", [False, True])
@pytest.mark.parametrize("cls", [tf.BertForMaskedLM, tf.BertLMHeadModel])
def test_an_encoder_is_no_causal_model_for_its_head(tmp_path, cls, is_decoder):
    """transformers builds a BertLMHeadModel of any BERT; only a decoder's tokens do not see those behind them."""
    config = tiny_model("bert").config
    config.is_decoder = is_decoder
    cls(config).save_pretrained(tmp_path / "bert")
    loftq.quantize_checkpoint(tmp_path / "bert", tmp_path / "q", loftq.LoftQConfig(bits=4, rank=2, num_iter=0))
    if is_decoder and cls is tf.BertLMHeadModel:
        load_for_inference(tmp_path / "q")
    if is_decoder:
        load_for_inference(tmp_path / "bert")
        return
    for folder in (tmp_path / "bert", tmp_path / "q"):
        with pytest.raises(
            loftq.SourceError,
            match=r"in which a token sees those behind it \(is_decoder is false .*\), expected a causal",
        ):
            load_for_inference(folder)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "mistral", "qwen2", "mixtral", "qwen3-moe"])
def test_causal_models_are_taken(name):
    check_causal(tiny_model(name), name)


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
