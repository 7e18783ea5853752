from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BatchEncoding, GPT2Config, GPT2ForSequenceClassification

from letters import letters
from loftq.data.chat import chat_examples
from loftq.data.labels import classification_examples
from loftq.data.language import completion_examples
from loftq.data.questions import question_examples
from loftq.data.rows import Row
from loftq.errors import SourceError
from loftq.evaluate import task
from loftq.evaluate.task import _prompt_ids, measure
from tiny import tiny_model


class _Byte:
    """Letters with ids below 96, for the tiny models."""

    pad_token_id, eos_token_id, is_fast = 0, 2, True

    def __call__(self, text: str, **options):
        return SimpleNamespace(
            input_ids=[3 + ord(c) % 90 for c in text], offset_mapping=[(i, i + 1) for i in range(len(text))]
        )


def completions() -> list[Row]:
    return [Row({"prompt": "ab" * (1 + 5 * n % 7), "completion": "xyz"[: 1 + n % 3]}, f"f, line {n}") for n in range(9)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_padding_leaves_perplexity_as_it_is(name):
    """Rotary, absolute and shifted absolute positions; each text's loss from the model's own, one text at a time."""
    model = tiny_model(name)
    found = completion_examples(completions(), _Byte(), 60)
    losses = []
    for e in found:
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(e.input_ids)[None].long()).logits[0, :-1]
        losses.append(
            torch.nn.functional.cross_entropy(logits, torch.from_numpy(e.labels)[1:].long(), reduction="none")
        )
        losses[-1] = losses[-1][torch.from_numpy(e.labels)[1:] >= 0]
    expected = float(torch.cat(losses).mean())
    for size in (1, 4, 9):
        value = measure(model, _Byte(), found, ["loss"], batch_size=size).metrics["loss"]
        print(name, size, value, expected)
        assert value == pytest.approx(expected, rel=1e-5)


def test_padding_leaves_the_class_of_a_decoder_as_it_is():
    """Its head reads the last token of a text, wherever the padding begins."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=64, num_labels=5)
    model = GPT2ForSequenceClassification(config).eval()
    with torch.no_grad():
        model.score.weight.normal_(0, 1)
        model.transformer.wte.weight.normal_(0, 1)

    class Plain(_Byte):
        def __call__(self, *texts: str, **options):
            return BatchEncoding({"input_ids": [3 + ord(c) % 90 for c in texts[0]]})

    rows = [Row({"text": "abcdefghijklmno"[n : 2 * n + 1], "label": n % 5}, f"f, line {n}") for n in range(9)]
    found = classification_examples(rows, Plain(), 20, list("01234"))
    together = measure(model, Plain(), found, ["accuracy"], batch_size=4, labels=list("01234"))
    single = measure(model, Plain(), found, ["accuracy"], batch_size=1, labels=list("01234"))
    assert [p.prediction for p in together.predictions] == [p.prediction for p in single.predictions]
    assert len({p.prediction for p in single.predictions}) > 1
    assert [p.id for p in together.predictions] == [f"f, line {n}" for n in range(9)]


def test_questions_of_one_id_are_apart():
    """Each is answered from its own context, though the data set gives all the same id, or none."""

    class First(torch.nn.Module):
        """Sure of the first token of the context: <s> q <sep> comes before it."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.config = tiny_model("bert").config

        def forward(self, input_ids, **inputs):
            logits = torch.zeros(input_ids.shape)
            logits[:, 3] = 9
            return SimpleNamespace(start_logits=logits, end_logits=logits)

    rows = [
        Row({"id": "None", "question": "q", "context": c, "answers": {"text": [c[0]], "answer_start": [0]}}, "f")
        for c in ("ab", "cde", "f")
    ]
    found = question_examples(rows, letters(pair=True), 20, doc_stride=4)
    result = measure(First(), letters(pair=True), found, ["exact_match"], batch_size=2)
    assert [p.prediction for p in result.predictions] == ["a", "c", "f"]
    assert result.metrics["exact_match"] == 100  # percent


def test_metrics_of_written_texts(monkeypatch):
    """Four answers: two equal but for spaces around them, one with another number, one with the number in other words."""
    rows = [Row({"prompt": "q", "completion": c}, f"f, line {n}") for n, c in enumerate(["#### 1", "#### 2"] * 2)]
    monkeypatch.setattr(
        task, "generate_texts", lambda *a, **o: ["#### 1", " #### 2\n", "#### 3", "It is two. #### 2.0"]
    )
    found = completion_examples(rows, letters(), 60)
    result = measure(tiny_model("llama"), letters(), found, ["exact_match", "gsm8k", "rouge1"])
    assert result.metrics["exact_match"] == 50
    assert result.metrics["exact_match_se"] == 25  # sqrt(1/2 1/2 / 4)
    assert result.metrics["gsm8k"] == 75
    # words of ASCII letters and digits: 1; 1; 0; of "it is two 2 0" one of five and of "2" all: 2 (1/5) / (6/5)
    assert result.metrics["rouge1"] == pytest.approx(100 * (1 + 1 + 0 + 1 / 3) / 4)
    assert result.rouge["stem"] is True
    assert result.rouge["sentences"] in ("punkt", "rule")
    assert [p.score for p in result.predictions] == [1, 1, 0, 0]


def test_the_prompt_of_a_conversation_ends_before_its_last_answer():
    tokenizer = letters()
    messages = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    found = chat_examples([Row({"messages": messages}, "f")], tokenizer, 200)
    expected = tokenizer.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(_prompt_ids(found[0])) == expected
    assert np.array_equal(found[0].input_ids[: len(_prompt_ids(found[0]))], _prompt_ids(found[0]))


def test_a_reference_without_a_number_is_said_before_anything_is_written(monkeypatch):
    rows = [Row({"prompt": "1+1=", "completion": c}, f"f, line {i}") for i, c in enumerate(("2", "two"), 1)]
    monkeypatch.setattr(task, "generate_texts", lambda *given, **options: pytest.fail("too late"))
    found = completion_examples(rows, letters(), 20)
    with pytest.raises(
        SourceError, match="f, line 2: the reference 'two' has no number after ####, expected one; repair"
    ):
        measure(tiny_model("llama"), letters(), found, ["perplexity", "gsm8k"])
