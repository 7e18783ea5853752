"""GSM8K's numbers, by hand and on every reference of the data set."""

import json
from decimal import Decimal

import pytest

from loftq.errors import ConfigError, SourceError
from loftq.evaluate.gsm8k import accuracy, answer_number, is_correct, published_number, reference_number


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#### 18", "18"),
        ("#### 18.", "18"),
        ("#### 18.0", "18"),
        ("####18", "18"),
        ("#### $18 a day", "18"),
        ("#### 70,000", "70000"),
        ("#### 1,234,567.5", "1234567.5"),
        ("#### -3", "-3"),
        ("#### −3", "-3"),
        ("#### -$3", "-3"),
        ("#### $-3", "-3"),
        ("#### 25%", "25"),
        ("#### .5", "0.5"),
        ("She has 5 left.\n#### 18\nQuestion: 7 and 8?\n#### 15", "18"),
        ("The final answer is: 18. That is 3 more than 15.", "18"),
        ("The final answer is 18.", "18"),
        ("So 3 + 15 = 18. The answer is clear", "18"),
        ("2 apples #### none", "2"),
        ("He sold 10-3 apples", "3"),
        ("that is 10 - 3", "3"),
        ("it is 10 + (-3)", "-3"),
        ("= -3", "-3"),
        ("(10)-3", "3"),
        ("3,4", "4"),
        ("1,2345", "2345"),
        ("12,345", "12345"),
        ("1/2 is 0.5", "0.5"),
        ("It costs $5.", "5"),
        ("<<16-3-4=9>>9 eggs", "9"),
        ("No.5", "5"),
    ],
)
def test_answers(text, expected):
    assert answer_number(text) == Decimal(expected)


@pytest.mark.parametrize("text", ["", "no idea", "####", "The final answer is: eighteen"])
@pytest.mark.parametrize("extract", [answer_number, published_number])
def test_no_number(text, extract):
    assert extract(text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The final answer is: 18. And 3 more.", "18"),
        ("The final answer is: 18 The final answer is: 20", "18"),
        # a marker that no number follows before the next one: the last number of the whole text
        ("The final answer is: x The final answer is: 20, 21", "21"),
        ("5 apples. The final answer is: none", "5"),
        ("7 apples. The final answer is 18, not 3", "3"),  # without the colon it is no marker
        ("5 apples #### 18, no 19", "19"),  # nor is the reference's
        ("70,000", "70000"),
        ("18.", "18"),
        # where the two rules differ
        ("3,4", "34"),
        ("10-3", "-3"),
    ],
)
def test_published_rule(text, expected):
    assert published_number(text) == Decimal(expected)


@pytest.mark.parametrize("name", ["test", "train"])
def test_every_reference_is_right_by_its_own_answer(shared_data, name):
    lines = shared_data(f"gsm8k/{name}.jsonl").read_text(encoding="utf-8").splitlines()
    references = [json.loads(line)["answer"] for line in lines]
    assert len(references) == {"test": 1319, "train": 7473}[name]
    assert accuracy(references, references) == {
        "accuracy": 100,
        "accuracy_se": 0,
        "correct": len(references),
        "without_number": 0,
        "count": len(references),
    }
    # as a model fine-tuned by the authors' script would write them
    published = [r.replace("####", "The final answer is:") for r in references]
    for extract in (answer_number, published_number):
        wrong = [r for p, r in zip(published, references, strict=True) if not is_correct(p, r, extract)]
        assert not wrong, wrong[:3]


def test_references():
    assert reference_number("2 + 2 = <<2+2=4>>4\n#### 1,234") == 1234
    assert reference_number("18") == 18
    with pytest.raises(SourceError, match="no number after ####"):
        reference_number("18 apples #### many")


def test_accuracy():
    found = accuracy(["#### 18", "17", "none", "It is 4.00"], ["#### 18", "#### 18", "#### 18", "#### 4"])
    # 2 of 4: sqrt(0.5 * 0.5 / 4) = 0.25
    assert found == {"accuracy": 50, "accuracy_se": 25, "correct": 2, "without_number": 1, "count": 4}
    assert accuracy(["10-3"], ["-3"])["correct"] == 0
    assert accuracy(["10-3"], ["-3"], extract=published_number)["correct"] == 1


def test_unequal_numbers():
    with pytest.raises(ConfigError, match="1 predictions and 2 references"):
        accuracy(["1"], ["1", "2"])
