"""ROUGE of summaries (Lin, *ROUGE: A Package for Automatic Evaluation of Summaries*, 2004), through ``rouge_score``.

    rouge1, rouge2  F1 of the shared unigrams and bigrams
    rougeL          F1 of the longest common subsequence of the two texts as one sequence of words each (section 3.1)
    rougeLsum       F1 of the union, over the sentences of the prediction, of the longest common subsequences with each
                    sentence of the reference (section 3.2): "summary level"; what ROUGE-1.5.5 prints as ROUGE-L

Words are runs of ASCII letters and digits in lower case; with ``stem`` Porter's stems of those longer than 3 letters.

Which of the two a paper's ROUGE-L is:

- BART (Lewis et al., 2020, table 3; CNN/DM 44.16 / 21.28 / 40.90, XSum 45.14 / 22.27 / 37.25): its repository scores
  CNN/DM with files2rouge, that is ROUGE-1.5.5: ``rougeLsum``, on texts tokenized by Stanford CoreNLP and split at
  " . ". files2rouge's default options do not stem: ``stem=False``.
- LoftQ (Li et al., 2024): its rows of full fine-tuning are BART's numbers. Its repository's ``train_summarization.py``
  computes all four scores here with stemming, on sentences found by nltk's punkt. The paper does not say which one its
  third number is. On CNN/DM that number lies about 3 points below ROUGE-1, as a summary-level score does: the
  hub's own evaluation of facebook/bart-large-cnn has ROUGE-1 42.9, ROUGE-L 30.6 and ROUGE-Lsum 40.0.
- A reference of XSum is one sentence. Where the prediction is one as well, the two are equal.

The scores of this module are of the same definition. Sentences are punkt's where its data are installed for nltk, and found
by a rule otherwise, which :func:`conditions` tells; it matters to ``rougeLsum`` alone. BART's tokens and sentence ends are not
here: compare its scores to within some tenths of a point.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from loftq.evaluate.metrics import check_pairs, mean_error
from loftq.optional import optional_module

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")

# A full stop, question or exclamation mark, with the quotes and brackets that close behind it, then white space before
# what may open a sentence. "U.S. Army" is split, "e.g. this" and "3.5 million" are not.
_SENTENCE_END = re.compile(r"""(?<=[.!?])([)\]"'’”]*)\s+(?=[("'‘“\[]*[A-Z0-9])""")


def split_sentences(text: str) -> list[str]:
    """The lines of a text of several lines; else its sentences, by a rule that needs no trained model.

    The rule: a sentence ends at ``.``, ``!`` or ``?``, closing quotes and brackets included, where white space and then a
    capital letter or a digit follow. CNN/DM's references have one sentence a line.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines if len(lines) > 1 else _SENTENCE_END.sub(r"\1\n", text.strip()).splitlines()


@cache
def punkt() -> Callable[[str], list[str]] | None:
    """nltk's sentence splitter for English, or ``None`` where nltk or its data are not installed. Nothing is fetched."""
    try:
        from nltk.tokenize import sent_tokenize

        sent_tokenize("One. Two.")
    except (ImportError, LookupError):
        return None
    return sent_tokenize


def told(conditions: Mapping[str, Any]) -> str:
    """What :func:`conditions` gives, in words."""
    return f"ROUGE {'with' if conditions['stem'] else 'without'} stems, sentences by {conditions['sentences']}"


def conditions(stem: bool) -> dict[str, Any]:
    """What the scores are taken with: ``stem``, and ``sentences``, ``punkt`` or ``rule``."""
    return {"stem": stem, "sentences": "punkt" if punkt() else "rule"}


def pair_scores(predictions: Sequence[str], references: Sequence[str], *, stem: bool = True) -> dict[str, list[float]]:
    """F1 of every pair in percent, by the names in :data:`ROUGE`.

    Args:
        predictions, references: one text each; sentences are lines and, within them, what :func:`punkt` finds; without it,
            as :func:`split_sentences` finds them. An empty text scores 0.
        stem: compare Porter's stems of the words.

    Raises:
        ConfigError: for no pairs, unequally many texts, or without the package rouge_score.
    """
    check_pairs("references", len(predictions), len(references))
    module = optional_module("rouge_score.rouge_scorer", "ROUGE", "rouge_score", "train")
    scorer = module.RougeScorer(list(ROUGE), use_stemmer=stem)
    found = [scorer.score(_lines(r), _lines(p)) for p, r in zip(predictions, references, strict=True)]
    return {name: [100 * scores[name].fmeasure for scores in found] for name in ROUGE}


def score_summaries(predictions: Sequence[str], references: Sequence[str], *, stem: bool = True) -> dict[str, float]:
    """Means of :func:`pair_scores` over the pairs, with their standard errors ``…_se``; arguments and errors are its."""
    return mean_scores(pair_scores(predictions, references, stem=stem))


def mean_scores(pairs: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Means of what :func:`pair_scores` returns, with their standard errors ``…_se``."""
    means = {name: float(np.mean(scores)) for name, scores in pairs.items()}
    return means | {f"{name}_se": mean_error(scores) for name, scores in pairs.items()}


def _lines(text: str) -> str:
    split = punkt()
    return "\n".join(split_sentences(text) if split is None else split(text.strip()))
