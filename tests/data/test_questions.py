from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from letters import letters
from loftq.data.questions import question_examples
from loftq.data.rows import Row
from loftq.errors import SourceError


def row(context: str, question: str, *answers: tuple[str, int], **more) -> Row:
    text, start = zip(*answers, strict=True)
    found = {"text": list(text), "answer_start": list(start)}
    return Row({"context": context, "question": question, "answers": found, **more}, "f, question q")


def answers(examples) -> list[str | None]:
    """The text that each window's span stands for."""
    found = []
    for e in examples:
        start, end = e.labels
        found.append(e.about["context"][e.about["offsets"][start][0] : e.about["offsets"][end][1]] if end else None)
    return found


def test_one_window():
    found = question_examples(
        [row("abcdefgh", "x?", ("cd", 2), ("c", 2), id="7")], letters(pair=True), 30, doc_stride=4
    )
    # <s> x ? <sep> a b c d: c is token 6
    assert [e.labels for e in found] == [(6, 7)]
    assert answers(found) == ["cd"]
    assert found[0].about["id"] == "7"
    assert found[0].about["answers"] == ["cd", "c"]
    assert [o is None for o in found[0].about["offsets"]] == [True] * 4 + [False] * 8 + [True]


def test_windows_overlap_and_an_answer_counts_only_where_it_is_whole():
    # 13 tokens leave 8 for the context behind <s> x ? <sep> and before <sep>; windows start 8 - 4 = 4 apart
    found = question_examples([row("abcdefghijklmnop", "x?", ("gh", 6))], letters(pair=True), 13, doc_stride=4)
    assert [e.about["context"][e.about["offsets"][4][0] :][:8] for e in found] == ["abcdefgh", "efghijkl", "ijklmnop"]
    assert answers(found) == ["gh", "gh", None]
    found = question_examples([row("abcdefghijklmnop", "x?", ("hij", 7))], letters(pair=True), 13, doc_stride=4)
    assert answers(found) == [None, "hij", None]


def test_bytes_of_one_character_are_one_answer():
    found = question_examples([row("aéb", "x?", ("é", 1))], letters(pair=True), 30, doc_stride=2)
    assert answers(found) == ["é"]


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (row("abc", "x?", ("b", 0)), "the answer 'b' is not at character 0 of the context, which has 'a' there"),
        (row("abc", "x" * 30, ("b", 1)), "the question leaves 0 of 30 tokens for its context"),
    ],
)
def test_rows_that_do_not_fit(example, words):
    with pytest.raises(SourceError) as error:
        question_examples([example], letters(pair=True), 30, doc_stride=4)
    assert str(error.value).startswith("f, question q")
    assert words in str(error.value), error.value


def test_spaces_around_an_answer_are_no_part_of_its_tokens():
    """A tokenizer that has no token for a space would never find the end of such an answer."""
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "<sep>": 2, "a": 3, "b": 4, "q": 5}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.BertProcessing(("<sep>", 2), ("<s>", 1))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", sep_token="<sep>", pad_token="<s>")
    found = question_examples([row(" a b ", "q", (" a b ", 0))], tokenizer, 12, doc_stride=2)
    assert [e.labels for e in found] == [(3, 4)]  # <s> q <sep> a b <sep>
