"""Examples for encoder-decoder models: a text to read and a summary to write."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from loftq.data.examples import Example, Examples, as_ids
from loftq.data.language import PROMPT, fill
from loftq.data.rows import Row


def end_token(tokenizer: Any) -> tuple[int | None, bool]:
    """The token that ends what a model writes, and whether the tokenizer adds it by itself.

    Where it adds none: its end-of-text token, or its separator; ``None`` where it has neither.
    """
    probe = tokenizer("a", return_special_tokens_mask=True)
    if probe.input_ids and probe.special_tokens_mask[-1]:
        return probe.input_ids[-1], True
    return (tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id), False


def summary_examples(
    rows: Iterable[Row], tokenizer: Any, max_length: int, *, max_target_length: int = 128, template: str = PROMPT
) -> Examples:
    """The text, cut at ``max_length`` tokens, and the summary with its end token, cut at ``max_target_length``, all of
    which is predicted.

    A summary that is cut ends with the end token too, as it does with the tokenizers that add one: what is learned is to
    stop there. ``template`` is for models that want a prefix, such as T5's ``summarize: {prompt}``.
    """
    found = Examples("summarization", max_length)
    end, is_added = end_token(tokenizer)
    ending = [] if is_added or end is None else [end]
    room = max_target_length - len(ending)
    for row in rows:
        text, summary = fill(template, row.values["text"]), row.values["summary"]
        ids = tokenizer(text, verbose=False).input_ids
        target = tokenizer(text_target=summary, verbose=False).input_ids
        if len(ids) > max_length or len(target) > room:
            found.was_cut(row.where)
            ids = tokenizer(text, truncation=True, max_length=max_length).input_ids
            target = tokenizer(text_target=summary, truncation=True, max_length=room).input_ids
        about = {"prompt": row.values["text"], "reference": summary}
        found.add([Example(as_ids(ids), as_ids([*target, *ending]), row.where, about=about)])
    return found
