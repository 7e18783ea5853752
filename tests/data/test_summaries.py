"""What an encoder-decoder reads and what it learns to write."""

from __future__ import annotations

import pytest
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

from letters import letters
from loftq.data.rows import Row
from loftq.data.summaries import summary_examples


def targets(tokenizer, *summaries: str, **options) -> list[str]:
    rows = [Row({"text": "abcdef", "summary": s}, f"line {i}") for i, s in enumerate(summaries, 1)]
    found = summary_examples(rows, tokenizer, 20, **options)
    return [tokenizer.decode(e.labels) for e in found]


def test_a_summary_ends_with_the_end_of_text_token_that_the_tokenizer_does_not_add():
    """Without it a model never learns to stop."""
    assert targets(letters(), "ab", "c") == ["<s>ab</s>", "<s>c</s>"]


def test_an_end_that_the_tokenizer_adds_is_not_doubled():
    assert targets(letters(pair=True), "ab") == ["<s>ab<sep>"]


def test_the_end_stays_where_a_summary_is_cut():
    assert targets(letters(), "abcdefgh", max_target_length=5) == ["<s>abc</s>"]
    assert targets(letters(pair=True), "abcdefgh", max_target_length=5) == ["<s>abc<sep>"]
    rows = [Row({"text": "a", "summary": s}, f"line {n}") for n, s in ((1, "abc"), (2, "abcd"))]
    found = summary_examples(rows, letters(), 20, max_target_length=5)
    assert (found.cut, found.first_cut) == (1, "line 2")  # <s> a b c </s> just fits


@pytest.mark.parametrize(("special", "expected"), [({"sep_token": "[SEP]"}, "x [SEP]"), ({}, "x")])
def test_where_there_is_no_end_of_text_token_a_separator_will_do(special, expected):
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "[SEP]": 1, "x": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **special)
    assert targets(tokenizer, "x") == [expected]
