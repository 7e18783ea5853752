"""Examples for encoder-decoder models: a text to read and a summary to write."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from loftq.data.examples import Example, Examples, as_ids
from loftq.data.language import PROMPT, fill
from loftq.data.rows import Row


def summary_examples(
    rows: Iterable[Row], tokenizer: Any, max_length: int, *, max_target_length: int = 128, template: str = PROMPT
) -> Examples:
    """The text, cut at ``max_length`` tokens, and the summary, cut at ``max_target_length``, all of which is predicted.

    ``template`` is for models that want a prefix, such as T5's ``summarize: {prompt}``.
    """
    found = Examples("summarization", max_length)
    for row in rows:
        text, summary = fill(template, row.values["text"]), row.values["summary"]
        ids = tokenizer(text, verbose=False).input_ids
        target = tokenizer(text_target=summary, verbose=False).input_ids
        if len(ids) > max_length or len(target) > max_target_length:
            found.was_cut(row.where)
            ids = tokenizer(text, truncation=True, max_length=max_length).input_ids
            target = tokenizer(text_target=summary, truncation=True, max_length=max_target_length).input_ids
        about = {"prompt": row.values["text"], "reference": summary}
        found.add([Example(as_ids(ids), as_ids(target), row.where, about=about)])
    return found
