"""SQuAD v1.1: exact match and F1 of answer texts, and the answer texts from a model's logits.

Rajpurkar et al., EMNLP 2016, section 6.1. Texts are compared after :func:`normalize`. Exact match asks whether they are
equal; F1 is that of their words as bags: P = shared / predicted, R = shared / expected, F1 = 2 P R / (P + R). Each is the
largest over a question's answers, then the mean over the questions. Every question of v1.1 has an answer in its context,
so there is no null answer: unlike v2.0's, a question's best span is its answer however small its logits.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loftq.config import positive_int
from loftq.errors import ConfigError
from loftq.evaluate.metrics import check_pairs, mean_error, share_error

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def normalize(text: str) -> str:
    """The text in lower case, without ASCII punctuation and the words a, an, the; one space between words.

    Punctuation goes first and leaves no space: ``the-end`` becomes ``theend``, one word.
    """
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction equals any of the answers after :func:`normalize`, else 0."""
    return max(float(normalize(prediction) == normalize(answer)) for answer in answers)


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Largest F1 in [0, 1] of the prediction's words against any of the answers'; 0 where no word is left."""
    return max(_f1(normalize(prediction).split(), normalize(answer).split()) for answer in answers)


def _f1(predicted: list[str], expected: list[str]) -> float:
    shared = (Counter(predicted) & Counter(expected)).total()
    return 2 * shared / (len(predicted) + len(expected)) if shared else 0.0


def score_answers(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """``exact_match`` and ``f1`` in percent, with their standard errors ``…_se`` over questions.

    Args:
        predictions: one text a question.
        answers: a question's right answers, at least one.

    Raises:
        ConfigError: for no questions, unequally many predictions, or a question without an answer.
    """
    check_pairs("questions", len(predictions), len(answers))
    for number, known in enumerate(answers):
        if isinstance(known, str) or not known:
            raise ConfigError(f"question {number} has the answers {known!r}, expected a list of at least one text")
    pairs = list(zip(predictions, answers, strict=True))
    exact = float(np.mean([exact_match(*pair) for pair in pairs]))
    shares = [f1(*pair) for pair in pairs]
    return {
        "exact_match": 100 * exact,
        "exact_match_se": 100 * share_error(exact, len(pairs)),
        "f1": 100 * float(np.mean(shares)),
        "f1_se": 100 * mean_error(shares),
    }


def best_spans(
    start_logits: ArrayLike,
    end_logits: ArrayLike,
    offsets: ArrayLike,
    questions: ArrayLike,
    contexts: Sequence[str],
    *,
    n_best: int = 20,
    max_answer_tokens: int = 30,
) -> list[str]:
    """One answer text a question, from the overlapping windows that its context was cut into.

    As in BERT's published SQuAD code: of a window's ``n_best`` first starts and ``n_best`` first ends, the pair with the
    largest sum of logits, start <= end, and at most ``max_answer_tokens`` tokens; of a question's windows, the one with
    the largest sum. Here only tokens of the context compete for the ``n_best`` places.

    Args:
        start_logits, end_logits: (windows, tokens) floats; one that is not finite cannot win.
        offsets: (windows, tokens, 2) first and one past the last character of a token in its context; (-1, -1) for what
            is no token of the context: the question, special tokens, padding.
        questions: (windows,) a window's question, as an index into ``contexts``.
        contexts: a question's whole context.

    Returns:
        Text of ``contexts``; "" for a question without a window, or where no pair of any window is allowed.

    Raises:
        ConfigError: for shapes that do not fit together, or a question without a context.
    """
    positive_int("n_best", n_best)
    positive_int("max_answer_tokens", max_answer_tokens)
    characters = np.asarray(offsets, dtype=np.int64)
    question = np.asarray(questions, dtype=np.int64)
    starts, ends = (np.asarray(a, dtype=np.float64) for a in (start_logits, end_logits))
    if starts.ndim != 2 or characters.shape != (*starts.shape, 2) or ends.shape != starts.shape:
        raise ConfigError(
            f"start and end logits have shapes {starts.shape} and {ends.shape}, offsets {characters.shape}, expected "
            f"(windows, tokens) twice and (windows, tokens, 2)"
        )
    if question.shape != starts.shape[:1] or ((question < 0) | (question >= len(contexts))).any():
        raise ConfigError(
            f"questions has shape {question.shape}, expected for each of {len(starts)} windows an index below "
            f"{len(contexts)}"
        )
    answers = [""] * len(contexts)
    if starts.size == 0:
        return answers
    outside = characters[..., 0] < 0
    first, begin = _largest(starts, outside, n_best)
    last, end = _largest(ends, outside, n_best)
    length = end[:, None, :] - begin[:, :, None] + 1
    allowed = (length >= 1) & (length <= max_answer_tokens)
    sums = np.where(allowed, first[:, :, None] + last[:, None, :], -np.inf).reshape(len(starts), -1)
    choice = sums.argmax(1)
    window = np.arange(len(starts))
    score = sums[window, choice]
    chosen_begin, chosen_end = begin[window, choice // begin.shape[1]], end[window, choice % end.shape[1]]
    for index in np.lexsort(
        (-window, score)
    ):  # ascending: a question's best window, the first of equal ones, comes last
        if np.isfinite(score[index]):
            text = contexts[question[index]]
            span = characters[index, chosen_begin[index], 0], characters[index, chosen_end[index], 1]
            answers[question[index]] = text[slice(*span)]
    return answers


def _largest(logits: NDArray[np.float64], outside: NDArray[np.bool_], count: int) -> tuple[NDArray, NDArray]:
    """(windows, count) largest finite logits inside, in descending order, and their positions."""
    inside = np.where(outside | ~np.isfinite(logits), -np.inf, logits)
    order = np.argsort(-inside, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(inside, order, axis=1), order
