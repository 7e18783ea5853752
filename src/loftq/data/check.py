"""What a data set becomes, for people to look at before they train on it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from loftq.data.examples import IGNORED, Example, Examples


@dataclass(frozen=True)
class Shown:
    """One token: its id, the text it stands for, and whether a model learns to predict it."""

    id: int
    text: str
    learned: bool


def tokens(example: Example, tokenizer: Any, task: str) -> list[Shown]:
    """The input's tokens, by id where there is no tokenizer; what is learned is marked where labels stand in the input."""
    ids = example.input_ids.tolist()
    if task == "qa":
        start, end = example.labels
        learned = [start <= i <= end and end > 0 for i in range(len(ids))]
    elif isinstance(example.labels, np.ndarray) and len(example.labels) == len(ids) and task != "summarization":
        # the first token has none before it to be predicted from
        learned = [i > 0 and label != IGNORED for i, label in enumerate(example.labels.tolist())]
    else:
        learned = [False] * len(ids)
    text = str if tokenizer is None else lambda i: tokenizer.decode([i])
    return [Shown(i, text(i), mark) for i, mark in zip(ids, learned, strict=True)]


def label_text(example: Example, tokenizer: Any, task: str, names: list[str] | None) -> str | None:
    """What is predicted beside the input: a class, a value, a summary; ``None`` where the input says it."""
    if task == "classification":
        return names[example.labels] if names else str(example.labels)
    if task == "regression":
        return f"{example.labels:g}"
    if task == "summarization":
        return tokenizer.decode(example.labels.tolist())
    if task == "qa":
        return f"{example.about['answers'][0]!r}" if example.labels[1] else "not in this window"
    return None


def summary(examples: Examples, names: list[str] | None) -> dict[str, Any]:
    """Rows, examples, tokens and labels of a split, as plain data."""
    lengths = np.array([len(e.input_ids) for e in examples])
    found: dict[str, Any] = {
        "task": examples.task,
        "rows": examples.rows,
        "examples": len(examples),
        "max_length": examples.max_length,
        "tokens": int(lengths.sum()),
        "shortest": int(lengths.min()),
        "median": float(np.median(lengths)),
        "longest": int(lengths.max()),
        "cut": examples.cut,
        "left_out": examples.dropped,
    }
    if isinstance(examples[0].labels, np.ndarray):
        found["predicted_tokens"] = examples.predicted
    if names is not None:
        counts = Counter(e.labels for e in examples)
        found["labels"] = {name: counts.get(i, 0) for i, name in enumerate(names)}
    if examples.task == "qa":
        found["windows_with_answer"] = sum(e.labels[1] > 0 for e in examples)
    return found
