"""KL divergence and perplexity in one pass, against direct float64 computations."""

import copy
import math

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

from loftq.errors import ConfigError, SourceError
from loftq.evaluate import head
from loftq.evaluate.divergence import Reference, score
from loftq.evaluate.head import losses, losses_and_divergence, parts_of
from loftq.evaluate.perplexity import perplexity
from tiny import tiny_model

WINDOW = 256


@pytest.fixture(scope="module")
def stories(stories_dir, one_thread):
    model = tf.AutoModelForCausalLM.from_pretrained(stories_dir).eval()
    return model, load_file(stories_dir / "tokens.safetensors")["eval"].long()[:1500]


@pytest.fixture(scope="module")
def noisy(stories):
    """The model with noise of a tenth of each projection's deviation."""
    model = copy.deepcopy(stories[0])
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "proj" in name:
            p.data += 0.1 * p.std() * torch.randn(p.shape, generator=generator)
    return model


def direct(model, ids, window):
    """(tokens, vocabulary) float64 log-probabilities and the targets, window by window."""
    rows, targets = [], []
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        for start in range(0, ids.numel() - 1, window):
            piece = ids[start : start + window + 1]
            rows.append(model(input_ids=piece[None, :-1]).logits[0].log_softmax(-1))
            targets.append(piece[1:])
    return torch.cat(rows), torch.cat(targets)


def standard_error(values):
    return float(values.std()) / math.sqrt(values.numel())


def test_against_float64(stories, noisy):
    model, ids = stories
    log_p, targets = direct(model, ids, WINDOW)
    log_q, _ = direct(noisy, ids, WINDOW)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    nll = -log_q.gather(1, targets[:, None])[:, 0]
    seen = []
    found = score(noisy, Reference.of(model, ids, WINDOW), advance=lambda _, n: seen.append(n))
    assert found.tokens == sum(seen) == ids.numel() - 1
    # float32 logits of size 20 are off by 1e-6, which averages over the tokens
    assert found.kl == pytest.approx(float(kl.mean()), abs=1e-6)
    assert found.kl > 0.05
    assert found.kl_se == pytest.approx(standard_error(kl), rel=1e-4)
    assert found.nll == pytest.approx(float(nll.mean()), abs=1e-6)
    assert found.perplexity_se == pytest.approx(math.exp(nll.mean()) * standard_error(nll), rel=1e-4)


def test_same_perplexity_as_alone(stories, noisy):
    model, ids = stories
    reference = Reference.of(model, ids, WINDOW)
    for own, found in ((model, reference.score), (noisy, score(noisy, reference))):
        alone = perplexity(own, ids, window=WINDOW)
        assert found.perplexity == pytest.approx(alone.perplexity, rel=1e-9)
        assert found.perplexity_se == pytest.approx(alone.standard_error, rel=1e-9)


def test_a_model_does_not_diverge_from_itself(stories):
    model, ids = stories
    found = score(model, Reference.of(model, ids, WINDOW))
    assert abs(found.kl) < 1e-8
    assert found.kl_se < 1e-8


def test_keeps_hidden_states_and_head_only(stories):
    model, ids = stories
    reference = Reference.of(model, ids, WINDOW)
    assert reference.states.shape == (ids.numel() - 1, model.config.hidden_size)
    assert reference.states.dtype == torch.float32
    assert reference.head.projection is model.lm_head


SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}


def gemma():
    config = tf.Gemma2Config(
        **SIZES,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        final_logit_softcapping=2.0,
        pad_token_id=0,
    )
    return tf.Gemma2ForCausalLM(config)


def granite():
    return tf.GraniteForCausalLM(tf.GraniteConfig(**SIZES, logits_scaling=3.0))


def cohere():
    return tf.CohereForCausalLM(tf.CohereConfig(**SIZES, eos_token_id=2, logit_scale=0.25))


class Shifted(nn.Module):
    """A model whose logits are not its head of its last hidden states."""

    def __init__(self, inner):
        super().__init__()
        self.wrapped = inner
        self.base_model_prefix = "model"
        self.model = inner.model
        self.config = inner.config

    def get_output_embeddings(self):
        return self.wrapped.lm_head

    def forward(self, input_ids):
        output = self.wrapped(input_ids=input_ids)
        output.logits = output.logits + torch.linspace(0, 3, output.logits.shape[-1])
        return output


MODELS = {
    **{name: (lambda name=name: tiny_model(name)) for name in ("llama", "qwen2", "gpt2", "opt")},
    "gemma2 (softcap)": gemma,
    "granite (divided)": granite,
    "cohere (scaled)": cohere,
}


@pytest.mark.parametrize("name", [*MODELS, "not split"])
def test_every_kind_of_head(name, one_thread):
    torch.manual_seed(0)
    model = (MODELS[name]() if name in MODELS else Shifted(tiny_model("llama"))).eval()
    ids = torch.randint(3, 96, (70,), generator=torch.Generator().manual_seed(2))
    assert parts_of(model, ids[:32]).split == (name != "not split")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p += 0.05 * p.std().nan_to_num() * torch.randn_like(p)
    log_p, _ = direct(model, ids, 32)
    log_q, targets = direct(other, ids, 32)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    reference = Reference.of(model, ids, 32)
    found = score(other, reference)
    # without a head the log-probabilities are stored as float16, whose relative error is 2^-11
    assert found.kl == pytest.approx(float(kl), abs=1e-6 if name != "not split" else 2e-4 * float(kl) + 1e-4)
    assert found.kl > 1e-5
    assert found.nll == pytest.approx(-float(log_q.gather(1, targets[:, None]).mean()), abs=1e-6)
    assert reference.score.nll == pytest.approx(-float(log_p.gather(1, targets[:, None]).mean()), abs=1e-6)


def test_packed_model_with_adapter(one_thread):
    import loftq

    model = tiny_model("llama")
    ids = torch.randint(3, 96, (64,), generator=torch.Generator().manual_seed(2))
    reference = Reference.of(copy.deepcopy(model), ids, 32)
    config = loftq.LoftQConfig(bits=3, rank=4, method="loftq", block_size=32)
    quantized = loftq.quantize_model(model, config, progress=False)
    assert parts_of(quantized, ids[:32]).split
    found = score(quantized, reference)
    assert found.perplexity == pytest.approx(perplexity(quantized, ids, window=32).perplexity, rel=1e-9)
    assert found.kl > 0


@pytest.mark.parametrize("vocabulary", [1, 5, 1023, 1024, 1025, 5000])
def test_row_loops(vocabulary, one_thread):
    generator = torch.Generator().manual_seed(3)
    p = 8 * torch.randn(7, vocabulary, generator=generator)
    q = p + torch.randn(7, vocabulary, generator=generator) + 30
    p[1] += 1e4  # only differences within a row count
    targets = torch.randint(0, vocabulary, (7,), generator=generator)
    log_p, log_q = p.double().log_softmax(1), q.double().log_softmax(1)
    expected = -log_q.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(losses(q, targets), expected, rtol=2e-6, atol=1e-6)
    nll, kl = losses_and_divergence(p, q, targets)
    torch.testing.assert_close(nll, expected, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(kl, (log_p.exp() * (log_p - log_q)).sum(1), rtol=1e-5, atol=2e-6)


def test_extreme_logits(one_thread):
    p = torch.tensor([[0.0, -math.inf, 1.0], [0.0, 0.0, 0.0], [1.0, 2.0, math.nan], [500.0, 0.0, 0.0]])
    q = torch.tensor([[0.0, 0.0, 1.0], [0.0, -1e4, 0.0], [1.0, 2.0, 3.0], [0.0, 400.0, 0.0]])
    nll, kl = losses_and_divergence(p, q, torch.tensor([0, 1, 0, 0]))
    log_p = p[0].double().log_softmax(0)[[0, 2]]
    log_q = q[0].double().log_softmax(0)[[0, 2]]
    assert float(kl[0]) == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()), rel=1e-5)
    assert float(kl[1]) == pytest.approx(1e4 / 3 - math.log(3) + math.log(2), rel=1e-6)
    assert math.isnan(kl[2])
    assert float(kl[3]) == pytest.approx(400, rel=1e-6)
    assert float(nll[1]) == pytest.approx(1e4 + math.log(2), rel=1e-6)
    assert math.isnan(losses(p[2:3], torch.tensor([0]))[0])


def test_chunks_do_not_change_the_result(stories, noisy, monkeypatch):
    model, ids = stories
    whole = score(noisy, Reference.of(model, ids, WINDOW))
    monkeypatch.setattr(head, "CHUNK", 100)
    assert score(noisy, Reference.of(model, ids, WINDOW)).kl == pytest.approx(whole.kl, abs=1e-7)


def test_another_vocabulary(one_thread):
    ids = torch.arange(3, 40)
    reference = Reference.of(tiny_model("llama"), ids, 16)
    smaller = tf.LlamaForCausalLM(
        tf.LlamaConfig(vocab_size=90, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    )
    with pytest.raises(ConfigError, match="predicts 90 tokens, expected the reference's 96"):
        score(smaller, reference)


def test_bad_text():
    with pytest.raises(SourceError, match="1 tokens"):
        Reference.of(tiny_model("llama"), torch.tensor([4]), 8)
    with pytest.raises(ConfigError, match="64 positions"):
        Reference.of(tiny_model("llama"), torch.arange(3, 20), 65)
