"""SQuAD v1.1: normalisation, scores by hand, and spans against a loop over every pair of every window."""

import json
import re

import numpy as np
import pytest

from loftq.errors import ConfigError
from loftq.evaluate.squad import best_spans, exact_match, f1, normalize, score_answers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat.", "cat"),
        ("an apple a day", "apple day"),
        ("theory of another", "theory of another"),  # articles are words, not letters
        ("the-end", "theend"),  # punctuation leaves no space, so no article is left
        ("U.S. 1,000", "us 1000"),
        ("A", ""),
        ("\tnew\nline ", "new line"),
        ("“quoted”", "“quoted”"),  # only ASCII punctuation
        ("Beyoncé's", "beyoncés"),
    ],
)
def test_normalize(text, expected):
    assert normalize(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "expected"),
    [
        ("The Denver Broncos!", ["Denver Broncos"], 1, 1),
        ("the cat sat", ["a cat sat down"], 0, 4 / 5),  # P = 2/2, R = 2/3
        ("no no yes", ["no"], 0, 1 / 2),  # a word counts as often as both have it: P = 1/3, R = 1
        ("cat", ["dog", "the cat", "black cat"], 1, 1),  # the best of the answers
        ("black dog", ["dog", "black cat tail"], 0, 2 / 3),  # P = 1/2, R = 1, before 2 / 5
        ("", ["cat"], 0, 0),
        ("the", ["a"], 1, 0),  # equal, but without a word to share, as in the published script for v1.1
    ],
)
def test_scores(prediction, answers, exact, expected):
    assert exact_match(prediction, answers) == exact
    assert f1(prediction, answers) == pytest.approx(expected)


def test_score_answers():
    found = score_answers(["cat", "the cat sat", "x", "dog"], [["cat"], ["cat sat down"], ["y"], ["dog", "cat"]])
    # exact 2 of 4, standard error sqrt(1/4 / 4); F1 of 1, 4/5, 0, 1: mean 0.7, squared deviations .09 + .01 + .49 + .09
    assert found == {
        "exact_match": 50,
        "exact_match_se": 25,
        "f1": pytest.approx(70),
        "f1_se": pytest.approx(100 * (0.68 / 3 / 4) ** 0.5),
    }


@pytest.mark.parametrize(
    ("answers", "message"),
    [([["x"], ["y"]], "1 predictions and 2 questions"), ([[]], "at least one"), (["x"], "expected a list")],
)
def test_mistakes(answers, message):
    with pytest.raises(ConfigError, match=message):
        score_answers(["x"], answers)


def slow_spans(starts, ends, offsets, questions, contexts, longest):
    """Every allowed pair of every window, by the definition."""
    answers, best = [""] * len(contexts), [-np.inf] * len(contexts)
    for window, question in enumerate(questions):
        for i in range(starts.shape[1]):
            for j in range(i, min(i + longest, starts.shape[1])):
                total = starts[window, i] + ends[window, j]
                if offsets[window, i, 0] >= 0 and offsets[window, j, 0] >= 0 and total > best[question]:
                    best[question] = total
                    answers[question] = contexts[question][offsets[window, i, 0] : offsets[window, j, 1]]
    return answers


def windows_of(contexts, size, stride, prefix=2):
    """Words as tokens, windows of ``size`` words after ``prefix`` tokens of a question, padded at the end."""
    offsets, questions = [], []
    for question, context in enumerate(contexts):
        words = [m.span() for m in re.finditer(r"\w+|[^\w\s]", context)]
        for begin in range(0, max(len(words) - size + stride, 1), stride):
            chosen = words[begin : begin + size]
            offsets.append([(-1, -1)] * prefix + chosen + [(-1, -1)] * (size - len(chosen)))
            questions.append(question)
    return np.array(offsets), np.array(questions)


@pytest.mark.parametrize("longest", [1, 3, 30])
@pytest.mark.parametrize("seed", range(3))
def test_against_every_pair(seed, longest):
    contexts = ["one two three four five six seven", "eight nine", "ten eleven twelve thirteen"]
    offsets, questions = windows_of(contexts, 5, 2)
    assert len(questions) == 4
    rng = np.random.default_rng(seed)
    starts, ends = rng.normal(size=(2, *offsets.shape[:2]))
    starts[:, 0] = ends[:, -1] = 9  # the question and the padding have the largest logits
    expected = slow_spans(starts, ends, offsets, questions, contexts, longest)
    assert best_spans(starts, ends, offsets, questions, contexts, max_answer_tokens=longest) == expected
    assert all(expected)


def one_window(starts, ends, context="a b c d", **options):
    offsets = [[(2 * i, 2 * i + 1) for i in range(len(starts))]]
    return best_spans([starts], [ends], offsets, [0], [context], **options)[0]


def test_pairs():
    assert one_window([0, 9, 0, 0], [0, 0, 9, 0]) == "b c"
    assert one_window([0, 0, 9, 0], [9, 1, 0, 2]) == "c d"  # an end before its start does not count
    assert one_window([9, 0, 0, 5], [0, 0, 0, 9], max_answer_tokens=3) == "d"  # 4 tokens are too many
    assert one_window([9, 0, 0, 5], [0, 0, 0, 9], max_answer_tokens=4) == "a b c d"
    assert one_window([0, 0, 9, 8], [9, 0, 0, 8], n_best=2) == "c d"
    assert one_window([0, 0, 0, 9], [9, 0, 0, 0], n_best=1) == ""  # the one start lies behind the one end
    assert one_window([np.nan, 0, 1, 0], [0, np.inf, 0, 1]) == "c d"
    assert one_window([np.nan] * 4, [np.nan] * 4) == ""


def test_best_window_wins():
    offsets = [[(0, 1), (2, 3)], [(2, 3), (4, 5)], [(0, 1), (2, 3)]]
    starts, ends = [[0, 3], [0, 4], [0, 9]], [[0, 3], [0, 4], [0, 9]]
    assert best_spans(starts, ends, offsets, [0, 0, 2], ["a b c", "no window", "x y"]) == ["c", "", "y"]
    # of equal windows the first
    assert best_spans([[1], [1]], [[1], [1]], [[(0, 1)], [(2, 3)]], [0, 0], ["a b"]) == ["a"]
    assert best_spans(np.zeros((0, 4)), np.zeros((0, 4)), np.zeros((0, 4, 2)), [], ["a"]) == [""]


@pytest.mark.parametrize(
    ("shapes", "questions", "message"),
    [
        (((2, 3), (2, 4), (2, 3, 2)), [0, 0], "have shapes"),
        (((2, 3), (2, 3), (2, 3)), [0, 0], "have shapes"),
        (((2, 3), (2, 3), (2, 3, 2)), [0], r"questions has shape \(1,\)"),
        (((2, 3), (2, 3), (2, 3, 2)), [0, 1], "an index below 1"),
    ],
)
def test_shapes(shapes, questions, message):
    with pytest.raises(ConfigError, match=message):
        best_spans(*map(np.zeros, shapes), questions, ["context"])


def test_gold_answers_of_real_questions(shared_data):
    """Where the logits point at the gold answer, that is the answer: from windows of 64 words, 32 apart."""
    data = json.loads(shared_data("squad/dev_xquad_en.json").read_text(encoding="utf-8"))["data"]
    paragraphs = [p for article in data for p in article["paragraphs"]]
    contexts = [p["context"] for p in paragraphs for _ in p["qas"]]
    gold = [q["answers"][0] for p in paragraphs for q in p["qas"]]
    assert len(gold) == 1190
    offsets, questions = windows_of(contexts, 64, 32)
    begin = np.array([g["answer_start"] for g in gold])[questions][:, None]
    end = begin + np.array([len(g["text"]) for g in gold])[questions][:, None]
    first, last = offsets[..., 0] == begin, offsets[..., 1] == end
    starts, ends = np.where(first, 8.0, 0), np.where(last, 8.0, 0)
    found = best_spans(starts, ends, offsets, questions, contexts)
    # an answer that begins or ends within a word, or of more than 30 words, is beyond these tokens; a logit of 8 and
    # one of 0 elsewhere are then a tie
    position = np.arange(offsets.shape[1])
    long = (last * position).max(1) - (first * position).max(1) >= 30
    reachable = {int(q) for q in questions[first.any(1) & last.any(1) & ~long]}
    assert len(reachable) > 1150, len(reachable)
    wrong = [(found[i], gold[i]["text"]) for i in sorted(reachable) if found[i] != gold[i]["text"]]
    assert not wrong, wrong[:5]
    texts = [g["text"] for g in gold]
    scores = score_answers(texts, [[t] for t in texts])
    assert (scores["exact_match"], scores["f1"]) == (100, 100)
