"""Batched generation gives what one prompt at a time gives, and changes nothing that it is given."""

import pytest
import torch
from safetensors.torch import load_file

import loftq
from byte_tokenizer import byte_tokenizer
from loftq.errors import ConfigError
from loftq.evaluate.generation import chat_prompt, generate_ids, generate_texts
from tiny import tiny_model

VOCABULARY = 259  # of byte_tokenizer
TEXTS = ["Once upon a time", "A", "The cat sat", "To be or not to be, that", "It", "Hello, world", "x y"]


def random_prompts(vocabulary=96):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in (5, 1, 12, 3, 3, 9, 7)]


def one_by_one(model, prompts, new):
    """Greedy decoding without a cache, padding or transformers' generate."""
    results = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(new):
            with torch.no_grad():
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == model.generation_config.eos_token_id:
                ids = ids[:, :-1]
                break
        results.append(ids[0, len(prompt) :].tolist())
    return results


def bytes_model(name):
    """Embeddings for the ids of :func:`byte_tokenizer`."""
    model = tiny_model(name)
    torch.manual_seed(0)
    model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_greedy_decoders(name):
    model = tiny_model(name)
    expected = one_by_one(model, random_prompts(), 10)
    for batch_size in (1, 3, 4, 7, 16):
        assert generate_ids(model, random_prompts(), max_new_tokens=10, batch_size=batch_size) == expected


def test_end_of_text():
    """With a second end token that occurs, continuations end before it; nothing of it or the padding is left."""
    model = tiny_model("llama")
    found = generate_ids(model, random_prompts(), max_new_tokens=10, batch_size=4)
    end = found[0][3]
    model.generation_config.eos_token_id = [model.generation_config.eos_token_id, end]
    ended = generate_ids(model, random_prompts(), max_new_tokens=10, batch_size=4)
    assert ended == [row[: row.index(end)] if end in row else row for row in found]
    assert len(ended[0]) < 4


@pytest.mark.parametrize("beams", [1, 3])
def test_encoder_decoder(beams):
    model = tiny_model("bart")
    options = {"max_new_tokens": 9, "num_beams": beams}
    found = [generate_ids(model, random_prompts(), batch_size=n, **options) for n in (1, 4, 7)]
    assert found[0] == found[1] == found[2]
    # against transformers itself, one unpadded input at a time; its output begins with the decoder's start token
    for prompt, tokens in zip(random_prompts(), found[0], strict=True):
        output = model.generate(torch.tensor([prompt]), max_new_tokens=9, num_beams=beams, do_sample=False)[
            0, 1:
        ].tolist()
        assert tokens == output[: output.index(model.generation_config.eos_token_id)]


def test_beams_of_a_decoder():
    model = tiny_model("llama")
    found = [generate_ids(model, random_prompts(), max_new_tokens=6, batch_size=n, num_beams=4) for n in (1, 4)]
    assert found[0] == found[1]
    assert found[0] != generate_ids(model, random_prompts(), max_new_tokens=6, batch_size=4)


def test_stories(stories_dir):
    """A pretrained model without a tokenizer: likely words follow in a batch as they do alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(stories_dir)
    ids = load_file(stories_dir / "tokens.safetensors")["eval"].tolist()
    prompts = [ids[i : i + n] for i, n in ((0, 20), (100, 3), (200, 41), (300, 8), (400, 8))]
    expected = one_by_one(model, prompts, 16)
    for batch_size in (1, 4):
        assert generate_ids(model, prompts, max_new_tokens=16, batch_size=batch_size) == expected


def test_quantized_with_adapter():
    model = loftq.quantize_model(tiny_model("llama"), loftq.LoftQConfig(bits=4, rank=4, num_iter=1, calibration=None))
    expected = one_by_one(model, random_prompts(), 6)
    assert generate_ids(model, random_prompts(), max_new_tokens=6, batch_size=4) == expected
    plain = generate_ids(model.get_base_model(), random_prompts(), max_new_tokens=6, batch_size=4)
    assert plain == expected  # the adapter is in the layers


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_texts(name):
    model, tokenizer = bytes_model(name), byte_tokenizer()
    expected = [
        tokenizer.decode(row, skip_special_tokens=True)
        for row in generate_ids(model, tokenizer(TEXTS).input_ids, max_new_tokens=8, batch_size=1)
    ]
    assert len(set(expected)) > 1, expected
    for batch_size in (1, 4):
        assert generate_texts(model, tokenizer, TEXTS, max_new_tokens=8, batch_size=batch_size) == expected
    ids = tokenizer(TEXTS).input_ids
    assert generate_texts(model, tokenizer, ids, max_new_tokens=8, batch_size=4) == expected
    assert generate_texts(model, tokenizer, [], max_new_tokens=8, batch_size=4) == []


def test_stop(monkeypatch):
    model, tokenizer = bytes_model("llama"), byte_tokenizer()
    options = {"max_new_tokens": 12, "batch_size": 4}
    whole = generate_texts(model, tokenizer, TEXTS, **options)
    stops = [whole[0][4:6], whole[3][7]]
    cut = generate_texts(model, tokenizer, TEXTS, stop=stops, **options)
    assert cut == [min((text.split(stop)[0] for stop in stops), key=len) for text in whole]
    assert cut[0] != whole[0]
    steps = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kw: steps.append(1) or forward(*args, **kw))
    assert generate_texts(model, tokenizer, TEXTS[:1], stop=whole[0][2], **options) == [whole[0][:2]]
    assert len(steps) == 3  # it ends there


def test_stop_of_beams():
    model, tokenizer = bytes_model("llama"), byte_tokenizer()
    options = {"max_new_tokens": 12, "num_beams": 2}
    stop = generate_texts(model, tokenizer, TEXTS, batch_size=4, **options)[0][4:6]
    found = [generate_texts(model, tokenizer, TEXTS, batch_size=n, stop=stop, **options) for n in (1, 4)]
    assert found[0] == found[1]
    assert not any(stop in text for text in found[0])


def test_sampling_is_repeatable():
    model, prompts = tiny_model("llama"), random_prompts()
    options = {"max_new_tokens": 8, "batch_size": 4, "temperature": 0.9, "top_p": 0.95}
    torch.manual_seed(5)
    expected_next = torch.rand(3)
    torch.manual_seed(5)
    found = [generate_ids(model, prompts, seed=seed, **options) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert torch.equal(torch.rand(3), expected_next)  # torch's own state is untouched


def test_narrow_sampling_is_greedy():
    model, prompts = tiny_model("llama"), random_prompts()
    greedy = generate_ids(model, prompts, max_new_tokens=8, batch_size=4)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        options = {"temperature": 1.5, **narrow}
        assert generate_ids(model, prompts, max_new_tokens=8, batch_size=4, **options) == greedy


def test_sampling_from_the_whole_distribution():
    """20,000 first tokens after one prompt, against softmax(logits / 0.7): within 5 standard errors for each token."""
    model, prompt = tiny_model("llama"), [5, 17, 40]
    with torch.no_grad():
        expected = torch.softmax(model(input_ids=torch.tensor([prompt])).logits[0, -1] / 0.7, -1)
    model.generation_config.eos_token_id = None
    model.generation_config.top_k = 3  # of the model's own; what is asked for here counts
    found = generate_ids(model, [prompt] * 20_000, max_new_tokens=1, batch_size=10_000, temperature=0.7)
    share = torch.bincount(torch.tensor(found).flatten(), minlength=96) / 20_000
    error = (expected * (1 - expected) / 20_000).sqrt()
    assert ((share - expected).abs() < 5 * error + 1e-4).all(), (share - expected).abs().max()


@pytest.mark.parametrize(
    ("name", "kept"), [("llama", ["<bos>", "t", "i", "m", "e"]), ("bart", ["<bos>", "O", "n", "c", "<eos>"])]
)
def test_long_prompts(name, kept, monkeypatch):
    """A decoder reads a prompt's end, an encoder-decoder its beginning; both keep the tokenizer's special tokens."""
    model, tokenizer = bytes_model(name), byte_tokenizer(bos=True, eos=name == "bart")
    seen = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **kw: seen.append(kw["input_ids"].tolist()) or generate(**kw))
    generate_texts(model, tokenizer, [TEXTS[0]], max_new_tokens=2, batch_size=1, max_prompt_tokens=5)
    assert tokenizer.convert_ids_to_tokens(seen[0][0]) == kept
    seen.clear()
    generate_texts(model, tokenizer, [list(range(3, 20))], max_new_tokens=2, batch_size=1, max_prompt_tokens=3)
    assert seen == [[[17, 18, 19]] if name == "llama" else [[3, 4, 5]]]


def test_nothing_is_changed(caplog):
    """The tokenizer's sides, the model's mode and generation_config, and no warning although all of it is set."""
    model, tokenizer = bytes_model("bart"), byte_tokenizer(padding_side="right", truncation_side="right")
    model.train()
    config = model.generation_config
    config.max_length, config.num_beams, config.length_penalty, config.early_stopping = 40, 4, 2.0, True
    config.do_sample, config.temperature, config.top_k, config.top_p, config.min_length = True, 0.5, 3, 0.5, 2
    before = config.to_dict()
    state = tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token_id, tokenizer(TEXTS).input_ids
    for beams in (1, 2):
        generate_texts(
            model, tokenizer, TEXTS, max_new_tokens=3, batch_size=4, num_beams=beams, max_prompt_tokens=4, stop="e"
        )
    assert state == (
        tokenizer.padding_side,
        tokenizer.truncation_side,
        tokenizer.pad_token_id,
        tokenizer(TEXTS).input_ids,
    )
    assert model.training
    assert model.generation_config is config
    assert config.to_dict() == before
    assert not caplog.records, [r.message for r in caplog.records]


@pytest.mark.parametrize("chat", [False, True])
def test_a_text_ends_with_what_training_taught(chat):
    """The tokenizer's end of text or the template's end of turn, where the model's generation_config knows of neither."""
    model, tokenizer, options = bytes_model("llama"), byte_tokenizer(), {"max_new_tokens": 9, "batch_size": 2}
    (written,) = generate_ids(model, [[40, 50, 60]], max_new_tokens=9, batch_size=1)
    end = next(token for token in written if written.index(token) > 1)
    mark = tokenizer.convert_ids_to_tokens(end)
    if chat:
        tokenizer.add_special_tokens({"additional_special_tokens": [mark]})
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}" + mark + "\n{% endfor %}"
    else:
        tokenizer.eos_token = mark
    assert model.generation_config.eos_token_id != end
    expected = tokenizer.decode(written[: written.index(end)], skip_special_tokens=True)
    assert generate_texts(model, tokenizer, [[40, 50, 60]], chat=chat, **options) == [expected]
    if chat:
        assert generate_texts(model, tokenizer, [[40, 50, 60]], **options) != [expected]


def test_a_model_keeps_its_own_settings():
    """A summarizer's shortest length: 7 tokens besides the start token, where it would end at once."""
    model = tiny_model("bart")
    prompt, start = [5, 17, 40], model.generation_config.decoder_start_token_id
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[start]])).logits
    model.generation_config.eos_token_id = int(logits[0, -1].argmax())
    assert generate_ids(model, [prompt], max_new_tokens=12, batch_size=1) == [[]]
    model.generation_config.min_length = 8
    assert len(generate_ids(model, [prompt], max_new_tokens=12, batch_size=1)[0]) >= 7


def test_a_padding_token_beyond_the_vocabulary():
    model = tiny_model("llama")
    expected = generate_ids(model, random_prompts(), max_new_tokens=5, batch_size=1)
    assert generate_ids(model, random_prompts(), max_new_tokens=5, batch_size=4, pad_token_id=96) == expected


def test_progress():
    done = []
    generate_ids(
        tiny_model("llama"),
        random_prompts(),
        max_new_tokens=1,
        batch_size=3,
        advance=lambda what, n: done.append((what, n)),
    )
    assert done == [("texts", 3), ("texts", 3), ("texts", 1)]


def test_chat():
    tokenizer = byte_tokenizer(bos=True)
    with pytest.raises(ConfigError, match="no chat template"):
        chat_prompt(tokenizer, "Hi")
    tokenizer.chat_template = (
        "<bos>{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    ids = chat_prompt(tokenizer, "Hi")
    assert tokenizer.decode(ids) == "<bos>user: Hi\nassistant:"  # the template's one <bos>
    assert generate_texts(bytes_model("llama"), tokenizer, [ids], max_new_tokens=3, batch_size=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"num_beams": 2, "temperature": 0.5}, "beam search takes temperature 0"),
        ({"max_new_tokens": 60}, "longest prompt has 24 tokens and max_new_tokens is 60, but the model has 64"),
        ({"stop": ["x", ""]}, "stop holds an empty text"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens is 0"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ConfigError, match=message):
        generate_texts(
            bytes_model("llama"), byte_tokenizer(), TEXTS, **{"max_new_tokens": 4, "batch_size": 2, **options}
        )


def test_what_cannot_be_continued():
    options = {"max_new_tokens": 4, "batch_size": 2}
    with pytest.raises(ConfigError, match="prompt 1 is empty"):
        generate_texts(bytes_model("llama"), byte_tokenizer(), ["x", ""], **options)
    with pytest.raises(ConfigError, match="the prompt is empty, expected some text"):
        generate_texts(bytes_model("llama"), byte_tokenizer(), [""], **options)
    with pytest.raises(ConfigError, match="a BertModel cannot write texts"):
        generate_ids(tiny_model("bert"), [[1, 2]], **options)
    assert generate_ids(tiny_model("llama"), [], **options) == []
    with pytest.raises(ConfigError, match="no decoder_start_token_id"):
        generate_ids(tiny_model("t5"), [[1, 2]], **options)
    with pytest.raises(ConfigError, match="64 positions; choose at most that many of each"):
        generate_ids(tiny_model("bart"), [[3] * 65], **options)


@pytest.mark.parametrize(("name", "length", "new"), [("llama", 60, 5), ("bart", 64, 64), ("opt", 1, 64)])
def test_all_positions_can_be_used(name, length, new):
    (found,) = generate_ids(tiny_model(name), [[3 + i for i in range(length)]], max_new_tokens=new, batch_size=1)
    assert len(found) <= new
