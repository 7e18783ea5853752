from __future__ import annotations

import pytest

from letters import letters
from loftq.data.labels import classification_examples, label_names, regression_examples
from loftq.data.rows import Row
from loftq.errors import SourceError


def rows(*labels, text="ab", **more) -> list[Row]:
    return [Row({"text": text, "label": label, **more}, f"f, line {i}") for i, label in enumerate(labels, 1)]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([1, 0, 1], ["0", "1"]),
        (["10", "9", "9"], ["9", "10"]),
        (["b", "a"], ["a", "b"]),
        ([1.0, "0"], ["0", "1"]),
        ([1, -1], ["-1", "1"]),
        ([0, "-1", 1], ["-1", "0", "1"]),
    ],
)
def test_classes_in_their_order(labels, names):
    assert label_names(rows(*labels)) == names


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["a", "a"], "have the label 'a', expected at least two classes"),
        ([0, "a"], "the label 'a' (f, line 2) is a name, but '0' (f, line 1) a number"),
        ([0, 0.5], "f, line 2 has the label 0.5, expected a class; for values use the task regression"),
        ([-1, -1], "f, line 1 has the label -1, which stands for a hidden one"),
        ([0, -1, 1, 2], "f, line 2 has the label -1, which stands for a hidden one"),  # SNLI
    ],
)
def test_labels_that_are_no_classes(labels, words):
    with pytest.raises(SourceError) as error:
        label_names(rows(*labels))
    assert words in str(error.value), error.value


def test_a_pair_with_types_as_bert_wants_it():
    found = classification_examples(rows("b", text_pair="c"), letters(pair=True), 20, ["a", "b"])
    a, b, c = (letters()(x, add_special_tokens=False).input_ids[0] for x in "abc")
    assert found[0].input_ids.tolist() == [1, a, b, 3, c, 3]  # <s> a b <sep> c <sep>
    assert found[0].extra["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1]
    assert found[0].labels == 1


def test_cut_rows_are_counted():
    found = classification_examples(rows("a", text="abc") + rows("a", text="abcd"), letters(), 4, ["a", "b"])
    assert [len(e.input_ids) for e in found] == [4, 4]
    assert found.cut == 1


def test_a_class_that_training_did_not_have():
    with pytest.raises(SourceError, match="f, line 2 has the label 'c', expected one of the training data: a, b"):
        classification_examples(rows("a", "c"), letters(), 4, ["a", "b"])


def test_a_hidden_label_is_no_class():
    assert [e.labels for e in classification_examples(rows(-1, 1), letters(), 9, ["-1", "1"])] == [0, 1]
    for names in (["0", "1"], ["no", "yes"]):
        with pytest.raises(SourceError, match="f, line 1 has the label -1, which stands for a hidden one"):
            classification_examples(rows(-1), letters(), 9, names)


def test_values():
    found = regression_examples(rows("2.5", 3), letters(), 8)
    assert [e.labels for e in found] == [2.5, 3.0]


@pytest.mark.parametrize("label", ["much", "True", "nan", float("inf"), 10**400])
def test_what_is_no_value(label):
    with pytest.raises(SourceError, match=r"f, line 1 has the label .* expected a number"):
        regression_examples(rows(label), letters(), 8)


def test_one_point_nought_is_a_class_as_a_number_and_a_name_as_a_text():
    assert label_names(rows("1.0", "1.1")) == ["1.0", "1.1"]
    with pytest.raises(SourceError, match=r"the label '1.0' \(f, line 2\) is a name, but '1' \(f, line 1\) a number"):
        label_names(rows("1", "1.0"))


@pytest.mark.parametrize("label", ["--1", "²"])
def test_what_only_looks_like_a_number_is_a_name(label):
    assert label_names(rows(label, "x")) == sorted([label, "x"])


def test_numbers_that_are_names_have_no_second_meaning():
    """Of the classes 1 and 2, 0 is none, though 1 has the index 0."""
    with pytest.raises(SourceError, match="has the label '0', expected one of the training data: 1, 2"):
        classification_examples(rows(0), letters(), 9, ["1", "2"])
    assert [e.labels for e in classification_examples(rows(0, "no"), letters(), 9, ["yes", "no"])] == [0, 1]


def test_the_letters_of_anlis_own_files_are_its_classes():
    names = ["entailment", "neutral", "contradiction"]
    found = classification_examples(rows("c", "e", "n", "neutral", "1"), letters(), 20, names)
    assert [e.labels for e in found] == [2, 0, 1, 1, 1]


def test_a_letter_is_no_class_elsewhere():
    with pytest.raises(
        SourceError, match="f, line 1 has the label 'a', expected one of the training data: apple, pear"
    ):
        classification_examples(rows("a"), letters(), 20, ["apple", "pear"])
