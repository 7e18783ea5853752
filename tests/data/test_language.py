from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from letters import learned, letters
from loftq.data.chat import chat_examples
from loftq.data.collate import Collator
from loftq.data.examples import IGNORED, Example
from loftq.data.language import causal_examples, completion_examples, joined_examples, pack
from loftq.data.rows import Row
from loftq.errors import SourceError
from tiny import tiny_model

S, E = 1, 2  # <s>, </s>


def rows(*values: dict) -> list[Row]:
    return [Row(v, f"f, line {i}") for i, v in enumerate(values, 1)]


def ids(text: str) -> list[int]:
    return letters()(text, add_special_tokens=False).input_ids


def test_running_text_is_cut_into_windows_with_texts_apart():
    found = causal_examples(rows({"text": "abc"}, {"text": "defg"}), letters(), 5)
    # <s> a b c </s> | <s> d e f g | </s>: one token alone predicts nothing
    assert [e.input_ids.tolist() for e in found] == [[S, *ids("abc"), E], [S, *ids("defg")]]
    assert all((e.labels == e.input_ids).all() for e in found)
    assert (found.rows, found.tokens, found.predicted, found.cut) == (2, 10, 8, 0)
    assert [e.where for e in found] == ["f, line 1", "f, line 2"]


def test_without_packing_a_row_is_an_example_and_may_be_cut():
    found = causal_examples(rows({"text": "abc"}, {"text": "defg"}), letters(), 5, packing=False)
    assert [e.input_ids.tolist() for e in found] == [[S, *ids("abc"), E], [S, *ids("defg")]]
    assert found.notes() == ["1 of 2 rows are longer than 5 tokens and were cut, first f, line 2"]


def test_empty_rows_of_running_text_are_left_out_and_said():
    lines = rows({"text": ""}, {"text": "abc"}, {"text": " "}, {"text": "de"})
    for packing in (True, False):
        found = causal_examples(lines, letters(), 9, packing=packing)
        assert "".join(letters().decode(e.input_ids) for e in found) == "<s>abc</s><s>de</s>"
        assert (found.rows, found.notes()) == (4, ["2 of 4 rows are empty and were left out, first f, line 1"])
    for make in (causal_examples, joined_examples):
        with pytest.raises(SourceError, match=r"all 2 rows of f are empty \(first: f, line 1\), expected texts"):
            make(rows({"text": ""}, {"text": " "}), letters(), 5).checked("f")


def test_joined_rows_are_one_text():
    found = joined_examples(rows({"text": ""}, {"text": "ab"}, {"text": ""}, {"text": "c"}), letters(), 6)
    whole = letters()("\n\nab\n\n\n\nc").input_ids
    assert [e.input_ids.tolist() for e in found] == [whole[:6], whole[6:]]
    assert whole[0] == S
    assert E not in whole
    assert all((e.labels == e.input_ids).all() for e in found)
    assert (found.rows, found.notes()) == (4, [])
    assert found[1].where == "rows joined from f, line 1 on, token 6"


def test_only_the_completion_and_the_end_are_learned():
    found = completion_examples(rows({"prompt": "2+2=", "completion": "4"}), letters(), 20)
    assert found[0].input_ids.tolist() == [S, *ids("2+2=4"), E]
    assert learned(found[0]) == "4</s>"
    assert found.predicted == 2
    assert found[0].about == {"prompt": "2+2=", "reference": "4", "prompt_tokens": 5}


def test_prompt_template():
    found = completion_examples(rows({"prompt": "a", "completion": "b"}), letters(), 20, template="Q: {prompt}\nA: ")
    assert letters().decode(found[0].input_ids) == "<s>Q: a\nA: b</s>"
    assert learned(found[0]) == "b</s>"


def test_a_token_on_the_border_belongs_to_the_completion():
    """Multi-byte characters: the bytes of one character share its offsets."""
    found = completion_examples(rows({"prompt": "a", "completion": "é"}), letters(), 20)
    assert len(found[0].input_ids) == 5  # <s> a two bytes </s>
    assert learned(found[0]) == "é</s>"


def test_what_is_too_long_is_cut_or_left_out_and_said():
    found = completion_examples(
        rows(
            {"prompt": "abcdef", "completion": "x"},
            {"prompt": "ab", "completion": "xyz"},
            {"prompt": "a", "completion": "x"},
        ),
        letters(),
        5,
    )
    assert [learned(e) for e in found] == ["xy", "x</s>"]
    assert found.notes() == [
        "1 of 3 rows are longer than 5 tokens and were cut, first f, line 2",
        "1 of 3 rows have nothing to predict within 5 tokens and were left out, first f, line 1",
    ]


def test_nothing_left():
    found = completion_examples(rows({"prompt": "abcdef", "completion": "x"}), letters(), 5)
    with pytest.raises(
        SourceError, match=r"none of the 1 rows of data leaves anything to predict within 5 tokens \(first: f"
    ):
        found.checked("data")


def test_packed_examples_give_the_loss_of_separate_ones():
    """On a model with random weights, to float32 rounding: attention, positions and labels all have to be right."""
    model = tiny_model("llama")
    generator = np.random.default_rng(0)
    found = completion_examples(rows({"prompt": "a", "completion": "b"}), letters(), 32)
    found.items = []
    for n in (9, 20, 5, 12, 11, 7, 3):
        ids = generator.integers(3, 96, n).astype(np.int32)
        labels = ids.copy()
        labels[: n // 2] = IGNORED
        found.items.append(Example(ids, labels, "f"))
    packed = pack(found)
    assert [len(e.input_ids) for e in packed] == [32, 32, 3]  # 20 + 12, 11 + 9 + 7 + 5, 3
    assert packed.predicted == found.predicted

    def summed(examples: list[Example], collate: Collator) -> float:
        batch = collate(examples)
        with torch.no_grad():
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
        return float(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
        )

    collate = Collator("completion", 0)
    apart = sum(summed([e], collate) for e in found)
    together = summed(list(packed), collate)  # windows of 32, 32 and 3 tokens, the last with padding
    print(apart, together)
    assert together == pytest.approx(apart, rel=1e-5)


def test_rows_without_anything_to_predict_are_left_out():
    """A loss over no token is no number."""
    tokenizer = letters()
    tokenizer.eos_token = None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    found = causal_examples(rows({"text": "a"}, {"text": "ab"}), tokenizer, 9, packing=False)
    assert (len(found), found.rows, found.dropped, found.first_dropped) == (1, 2, 1, "f, line 1")


def test_one_long_text_becomes_windows_and_the_rest_begins_the_next():
    found = causal_examples(rows({"text": "a" * 1000}, {"text": "b" * 20}), _Fixed(), 128)  # 1001 and 21 tokens
    assert [len(e.input_ids) for e in found] == [128] * 7 + [126]
    assert [e.where for e in found] == ["f, line 1"] * 8
    assert found.tokens == 1022


class _Fixed:
    eos_token_id = 2

    def __call__(self, text: str, verbose: bool) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[7] * len(text))


@pytest.mark.parametrize("prepend", ["always", "first"])
@pytest.mark.parametrize("ends", [False, True])
def test_a_tokenizer_that_marks_words_and_ends_texts_itself(prepend, ends):
    """As SentencePiece does: the mark of a word stands for the space before it, or for none at all."""
    names = ["<unk>", "<s>", "</s>", *"isab!", "▁"]
    vocabulary = {name: i for i, name in enumerate([*names, "▁a"])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a")], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if ends else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    found = completion_examples(rows({"prompt": "is ", "completion": "ab a!"}), tokenizer, 99)
    pieces = tokenizer.convert_ids_to_tokens([i for i in found[0].labels.tolist() if i != IGNORED])
    assert pieces == ["▁a", "b", "▁a", "!", "</s>"]
    assert found[0].input_ids.tolist().count(2) == 1
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    )
    messages = [
        {"role": role, "content": content}
        for role, content in (("user", "is"), ("assistant", "ab"), ("user", "si"), ("assistant", "ba"))
    ]
    chat = chat_examples(rows({"messages": messages}), tokenizer, 99)
    assert chat[0].input_ids.tolist().count(1) == 1  # the template begins the text, the tokenizer not once more
    assert tokenizer.convert_ids_to_tokens([i for i in chat[0].labels.tolist() if i != IGNORED]) == [
        *(["a", "b", "</s>"]),
        *(["b", "a", "</s>"]),
    ]
