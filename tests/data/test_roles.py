from __future__ import annotations

import pytest

from loftq.data.roles import Roles
from loftq.data.rows import Row
from loftq.data.tasks import TASKS, task
from loftq.errors import ConfigError, SourceError


def columns(name: str, row: dict, mapping: dict | None = None) -> dict[str, str]:
    return dict(Roles.find(task(name), Row(row, "f, line 1"), mapping or {}).columns)


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("classification", {"sentence": "", "label": 0}, {"text": "sentence", "label": "label"}),
        (
            "classification",  # MRPC, STS-B, RTE
            {"sentence1": "", "sentence2": "", "label": 0, "idx": 0},
            {"text": "sentence1", "text_pair": "sentence2", "label": "label"},
        ),
        (
            "classification",  # QNLI
            {"question": "", "sentence": "", "label": 0},
            {"text": "question", "text_pair": "sentence", "label": "label"},
        ),
        (
            "classification",  # MNLI and ANLI
            {"premise": "", "hypothesis": "", "label": 0},
            {"text": "premise", "text_pair": "hypothesis", "label": "label"},
        ),
        ("regression", {"text": "", "score": 0}, {"text": "text", "label": "score"}),
        ("completion", {"question": "", "answer": ""}, {"prompt": "question", "completion": "answer"}),
        (
            "completion",  # Alpaca
            {"instruction": "", "input": "", "output": ""},
            {"prompt": "instruction", "input": "input", "completion": "output"},
        ),
        ("completion", {"input": "", "output": ""}, {"prompt": "input", "completion": "output"}),
        ("completion", {"prompt": "", "input": "", "output": ""}, {"prompt": "prompt", "completion": "output"}),
        (
            "chat",
            {"instruction": "", "input": "", "output": ""},
            {"prompt": "instruction", "input": "input", "completion": "output"},
        ),
        ("chat", {"messages": [], "instruction": "", "input": "", "output": ""}, {"messages": "messages"}),
        ("chat", {"prompt": "", "completion": ""}, {"prompt": "prompt", "completion": "completion"}),
        ("chat", {"messages": [], "prompt": ""}, {"messages": "messages"}),
        ("summarization", {"document": "", "summary": ""}, {"text": "document", "summary": "summary"}),
        ("summarization", {"article": "", "highlights": ""}, {"text": "article", "summary": "highlights"}),
        ("qa", {"context": "", "question": "", "answers": {}}, {r: r for r in ("context", "question", "answers")}),
    ],
)
def test_usual_names(name, row, expected):
    assert columns(name, row) == expected


def test_map_wins_and_frees_nothing(tmp_path):
    assert columns("classification", {"text": "", "body": "", "y": 0}, {"body": "text", "y": "label"}) == {
        "text": "body",
        "label": "y",
    }


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({"instruction": "prompt"}, {"prompt": "instruction"}),
        ({"input": "prompt"}, {"prompt": "input"}),
        ({"instruction": "prompt", "input": "input"}, {"prompt": "instruction", "input": "input"}),
        ({"output": "completion"}, {"prompt": "instruction", "input": "input"}),
    ],
)
def test_a_map_says_what_of_alpaca_is_taken(mapping, expected):
    row = {"instruction": "", "input": "", "output": ""}
    assert columns("completion", row, mapping) == {**expected, "completion": "output"}


def test_an_input_follows_its_instruction():
    roles = Roles(task("completion"), {"prompt": "instruction", "input": "input", "completion": "output"})
    rows = [Row({"instruction": "Add.", "input": i, "output": "2"}, "f, line 1") for i in ("1 + 1", "")]
    assert [row.values for row in roles.apply(rows)] == [
        {"prompt": "Add.\n\n1 + 1", "completion": "2"},
        {"prompt": "Add.", "completion": "2"},
    ]


FULL = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
BARE = {"instruction": "Say hi.", "output": "Hi."}


def applied(name: str, *rows: dict, mapping: dict | None = None) -> list[dict]:
    found = [Row(row, f"f, line {i}") for i, row in enumerate(rows, 1)]
    return [row.values for row in Roles.find(task(name), found[0], mapping or {}).apply(found)]


@pytest.mark.parametrize("name", ["completion", "chat"])
@pytest.mark.parametrize("bare", [BARE, {**BARE, "input": None}])
def test_rows_of_alpaca_have_an_input_or_lack_it(name, bare):
    full, short = {"prompt": "Add.\n\n1 + 1", "completion": "2"}, {"prompt": "Say hi.", "completion": "Hi."}
    assert applied(name, FULL, bare) == [full, short]
    assert applied(name, bare, FULL, bare) == [short, full, short]


def test_a_mapped_input_is_in_some_row():
    bare, full = {"prompt": "a", "completion": "b"}, {"prompt": "c", "context": "d", "completion": "e"}
    expected = [{"prompt": "a", "completion": "b"}, {"prompt": "c\n\nd", "completion": "e"}]
    assert applied("completion", bare, full, mapping={"context": "input"}) == expected
    with pytest.raises(
        SourceError,
        match="none of the rows that were read, from f, line 1 on, has the column 'contxt', which is mapped to input",
    ):
        applied("completion", bare, full, mapping={"contxt": "input"})


def test_questions_with_and_without_an_id():
    row = {"context": "a", "question": "b", "answers": {"text": ["a"], "answer_start": [0]}}
    assert ["id" in values for values in applied("qa", row, {**row, "id": 7})] == [False, True]


PAIR = {"sentence1": "a", "sentence2": "b", "label": 0}
ONE = {"sentence1": "a", "label": 0}


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        (
            "classification",
            [ONE, PAIR],
            "line 2 has the column 'sentence2' for text_pair, but f, line 1 has none; give all",
        ),
        ("classification", [PAIR, ONE], "f, line 2 has no column 'sentence2', it has sentence1, label"),
        (
            "completion",
            [{"input": "a", "output": "b"}, FULL],
            "f, line 2 has the column 'instruction' for prompt, but f, line 1 has the column 'input'; give all rows the",
        ),
    ],
)
def test_a_column_that_would_be_left_out_is_said(name, rows, words):
    with pytest.raises(SourceError) as raised:
        applied(name, *rows)
    assert words in str(raised.value), raised.value


def test_true_and_false_are_names_of_classes_as_in_a_table():
    rows = [{"text": "a", "label": label} for label in (True, "True", False)]
    assert [values["label"] for values in applied("classification", *rows)] == ["True", "True", "False"]


@pytest.mark.parametrize(
    ("row", "mapping", "error", "words"),
    [
        ({"a": "", "label": 0}, {}, SourceError, "f, line 1 has the columns a, label, but none is known as text"),
        ({"a": ""}, {"a": "title"}, ConfigError, "expected one of text, label, text_pair"),
        ({"a": "", "b": ""}, {"a": "text", "b": "text"}, ConfigError, "mapped to both 'a' and 'b'"),
        ({"a": ""}, {"b": "text"}, SourceError, "has no column 'b', it has a"),
    ],
)
def test_wrong_maps(row, mapping, error, words):
    with pytest.raises(error) as raised:
        columns("classification", row, mapping)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("causal", {"text": 3}, "f, line 2: text is 3, expected a text"),
        ("summarization", {"text": "  ", "summary": "a"}, "f, line 2: text is empty"),
        ("classification", {"text": "", "label": 1}, "f, line 2: text is empty"),
        ("causal", {"text": "a\ud800"}, r"f, line 2: text has half a character, '\ud800', at 1"),
        ("chat", {"messages": [{"role": "assistant", "content": "\udfff"}]}, "messages has half a character"),
        ("classification", {"text": "a", "label": " "}, "label is ' ', expected a label"),
        ("chat", {"messages": [{"role": "user", "content": None}]}, "both texts; repair or remove the row"),
        ("qa", {"context": "a", "question": "b", "answers": {"text": [" "], "answer_start": [0]}}, "as in SQuAD v1.1"),
        ("causal", {"body": "a"}, "f, line 2 has no column 'text', it has body"),
        ("classification", {"text": "a", "label": None}, "f, line 2: label is None, expected a label"),
        ("chat", {"messages": "hello"}, "expected a list of messages"),
        ("chat", {"messages": [{"role": "user"}]}, "expected a role and a content"),
        ("chat", {"messages": [{"role": "user", "content": "a"}]}, "no message of the assistant"),
        ("qa", {"context": "a", "question": "b", "answers": {"text": ["a"]}}, "as in SQuAD v1.1"),
        ("qa", {"context": "a", "question": "b", "answers": {"text": [], "answer_start": []}}, "as in SQuAD v1.1"),
    ],
)
def test_rows_that_do_not_fit(name, row, words):
    good = {role: role for role in TASKS[name].roles}
    with pytest.raises(SourceError) as raised:
        list(Roles(task(name), good).apply([Row(row, "f, line 2")]))
    assert words in str(raised.value), raised.value


def test_texts_that_may_be_empty():
    """A blank line of running text, and either text of a pair, as in QQP; not both."""
    blank = [Row({"text": ""}, "f, line 1")]
    assert [row.values for row in Roles(task("causal"), {"text": "text"}).apply(blank)] == [{"text": ""}]
    pair = Roles(task("classification"), {"text": "text", "text_pair": "b", "label": "y"})
    rows = [Row({"text": a, "b": b, "y": 0}, "f, line 2") for a, b in (("a", ""), ("", "b"))]
    assert [(row.values["text"], row.values["text_pair"]) for row in pair.apply(rows)] == [("a", ""), ("", "b")]
    with pytest.raises(SourceError, match="f, line 2 has two empty texts, expected a text"):
        list(pair.apply([Row({"text": "", "b": " ", "y": 0}, "f, line 2")]))


def test_turns_as_sharegpt_writes_them():
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    roles = Roles.find(task("chat"), Row({"conversations": turns}, "f, line 1"), {})
    (row,) = roles.apply([Row({"conversations": turns}, "f, line 1")])
    expected = [("system", "s"), ("user", "a"), ("assistant", "b")]
    assert [(m["role"], m["content"]) for m in row.values["messages"]] == expected
    for wrong in ({"from": "crowd", "value": "c"}, {"from": ["gpt"], "value": "c"}, {"from": "gpt"}):
        with pytest.raises(SourceError, match="expected a role and a content, both texts"):
            list(roles.apply([Row({"conversations": [*turns, wrong]}, "f, line 1")]))
