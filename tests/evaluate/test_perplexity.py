"""Perplexity: every token once, against a naive loop and a known value."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from loftq.errors import ConfigError, SourceError
from loftq.evaluate.perplexity import perplexity
from loftq.evaluate.text import builtin_text, read_text
from tiny import tiny_model


@pytest.fixture(scope="module")
def stories(stories_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(stories_dir), load_file(stories_dir / "tokens.safetensors")[
        "eval"
    ].long()


def test_known_value(stories):
    model, ids = stories
    result = perplexity(model, ids, window=256, batch_size=4)
    assert result.perplexity == pytest.approx(6.836, abs=0.01)
    assert result.tokens == ids.numel() - 1
    assert 0 < result.standard_error < 0.5


def naive_nll(model, ids, window, stride):
    """One token at a time: its context reaches back to the start of the first window that can score it."""
    losses = []
    for target in range(1, ids.numel()):
        start = 0
        while start + window < target:
            start += stride
        with torch.no_grad():
            logits = model(input_ids=ids[None, start:target]).logits[0, -1].double()
        losses.append(-torch.log_softmax(logits, -1)[ids[target]])
    return torch.stack(losses)


@pytest.mark.parametrize(("window", "stride"), [(8, None), (8, 3), (8, 8), (5, 1), (64, None), (2, 1)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_against_a_naive_loop(window, stride, batch_size):
    model = tiny_model("llama")
    ids = torch.randint(3, 96, (29,), generator=torch.Generator().manual_seed(2))
    expected = naive_nll(model, ids, window, stride or window)
    result = perplexity(model, ids, window=window, stride=stride, batch_size=batch_size)
    assert result.tokens == 28
    assert result.nll == pytest.approx(float(expected.mean()), abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nll))
    expected_error = result.perplexity * float(expected.std()) / math.sqrt(28)
    assert result.standard_error == pytest.approx(expected_error, rel=1e-4)


def test_mode_is_restored_and_progress_adds_up():
    model = tiny_model("llama").train()
    seen = []
    perplexity(model, torch.arange(3, 60), window=16, advance=lambda _, n: seen.append(n))
    assert model.training
    assert sum(seen) == 56


def test_overflow_is_infinite_not_an_error():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids):
            logits = torch.full((*input_ids.shape, 10), -1e4)
            logits[..., 0] = 0
            return type("Output", (), {"logits": logits})

    assert perplexity(Broken(), torch.arange(1, 9), window=4).perplexity == math.inf


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window is 1"),
        ({"window": 65}, "64 positions"),
        ({"window": 8, "stride": 9}, "stride is 9"),
        ({"window": 8, "stride": 0}, "stride is 0"),
        ({"window": 8, "batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        perplexity(tiny_model("llama"), torch.arange(3, 20), **options)


def test_too_little_text():
    with pytest.raises(SourceError, match="1 tokens, expected at least 2"):
        perplexity(tiny_model("llama"), torch.tensor([4]), window=8)


def test_builtin_text_is_prose_of_some_length():
    text = builtin_text()
    assert len(text) > 50_000
    assert builtin_text() == text
    assert "::=" not in text


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9")
    assert read_text(str(path)) == "café"


@pytest.mark.parametrize(
    ("content", "message"), [(None, "is no file"), (b"  \n", "is empty"), (b"caf\xe9", "not UTF-8 at byte 3")]
)
def test_unreadable_text(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SourceError, match=message):
        read_text(str(path))
