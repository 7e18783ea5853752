"""Examples for language models: running text in windows, and prompts with completions; conversations are :mod:`.chat`'s.

The loss mask of the latter lets a model learn answers only. Where an answer begins is decided on characters: a token
belongs to the answer if any of its characters does, so that a text is tokenized as a whole, as the model has seen text,
and not in pieces.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from loftq.data.examples import IGNORED, Example, Examples, as_ids
from loftq.data.rows import Row
from loftq.errors import ConfigError

Spans = Sequence[tuple[int, int]]


PROMPT = "{prompt}"
"""The prompt template that leaves a prompt as it is."""


def checked_template(template: str) -> str:
    """A prompt template, if it has a place for the prompt; other braces are text.

    Raises:
        ConfigError: it has none.
    """
    if PROMPT not in template:
        raise ConfigError(f"the prompt template {template!r} has no {PROMPT}; put it where the row's prompt belongs")
    return template


def fill(template: str, prompt: str) -> str:
    """A prompt in its template."""
    return template.replace(PROMPT, prompt)


def causal_examples(rows: Iterable[Row], tokenizer: Any, max_length: int, *, packing: bool = True) -> Examples:
    """Every token is predicted from those before it.

    With ``packing`` the texts form one stream, separated by the end-of-text token, and are cut into windows of
    ``max_length`` tokens; the last window may be shorter. Without it a row is an example of its own, cut at
    ``max_length``. Empty rows are left out.
    """
    found = Examples("causal", max_length)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    where = ""
    for row in rows:
        if not row.values["text"].strip():
            found.was_empty(row.where)
            continue
        ids = tokenizer(row.values["text"], verbose=False).input_ids
        # a tokenizer may end texts itself
        ids = ids if end and ids[-1:] == end else ids + end
        if not packing:
            if len(ids) < 2:
                found.was_dropped(row.where)
                continue
            if len(ids) > max_length:
                found.was_cut(row.where)
            found.add([_example(ids[:max_length], ids[:max_length], row.where)])
            continue
        where = where or row.where
        found.rows += 1
        stream += ids
        begin = 0
        while len(stream) - begin >= max_length:
            window = stream[begin : begin + max_length]
            found.items.append(_example(window, window, where))
            begin += max_length
            where = row.where if len(stream) > begin else ""
        del stream[:begin]  # once a row: a whole book may be one
    if len(stream) > 1:
        found.items.append(_example(stream, stream, where))
    return found


def joined_examples(rows: Iterable[Row], tokenizer: Any, max_length: int) -> Examples:
    """Rows that are the lines or paragraphs of one text, with a blank line between them, in windows as running text.

    It is the text that published perplexities of WikiText-2 are measured on (GPTQ, arXiv 2210.17323, and after it): empty
    rows are part of it, and no row begins or ends with a token of its own.
    """
    found = Examples("causal", max_length)
    texts = []
    first = ""
    for row in rows:
        first = first or row.where
        texts.append(row.values["text"])
    found.rows = len(texts)
    text = "\n\n".join(texts)
    if not text.strip():
        found.empty, found.first_empty = found.rows, first
        return found
    ids = tokenizer(text, verbose=False).input_ids
    for begin in range(0, len(ids) - 1, max_length):
        window = ids[begin : begin + max_length]
        found.items.append(_example(window, window, f"rows joined from {first} on, token {begin}"))
    return found


def completion_examples(rows: Iterable[Row], tokenizer: Any, max_length: int, *, template: str = PROMPT) -> Examples:
    """Prompt and completion as one text, then the end-of-text token; the completion and the end are predicted."""
    found = Examples("completion", max_length)
    for row in rows:
        prompt, completion = fill(template, row.values["prompt"]), row.values["completion"]
        spans = [(len(prompt), len(prompt) + len(completion))]
        ids, parts = encode_spans(tokenizer, prompt + completion, spans, special=True)
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids, parts = [*ids, tokenizer.eos_token_id], [*parts, 0]
        elif ids:
            parts[-1] = 0
        add_learned(found, row.where, [(ids, parts, [{"prompt": prompt, "reference": completion}])])
    return found


def encode_spans(tokenizer: Any, text: str, spans: Spans, *, special: bool) -> tuple[list[int], list[int | None]]:
    """Token ids of a text, and for each the last of the spans that it has characters of, or ``None``.

    Raises:
        ConfigError: the tokenizer cannot say which characters a token stands for.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{type(tokenizer).__name__} cannot say which characters a token stands for, expected a fast tokenizer; install "
            f"the model's tokenizer.json"
        )
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    last = [(i, start, stop) for i, (start, stop) in enumerate(spans)][::-1]
    parts = [next((i for i, start, stop in last if a < stop and b > start), None) for a, b in encoded.offset_mapping]
    return encoded.input_ids, parts


Masked = tuple[list[int], list[int | None], Sequence[dict[str, Any]]]
"""Token ids, the part of each that is learned, and what is known about each part."""


def add_learned(found: Examples, where: str, texts: Sequence[Masked]) -> None:
    """Add the examples of a row: each learns the tokens of its parts, and knows of the last that is not cut away."""
    kept = [e for e in (_learned(*text, where, found.max_length) for text in texts) if e is not None]
    if not kept:
        found.was_dropped(where)
        return
    if any(len(ids) > found.max_length for ids, _, _ in texts):
        found.was_cut(where)
    found.add(kept)


def _learned(
    ids: list[int], parts: list[int | None], about: Sequence[dict[str, Any]], where: str, max_length: int
) -> Example | None:
    """``None`` where all parts are cut away."""
    kept = parts[:max_length]
    seen = [part for part in kept[1:] if part is not None]
    if not seen:
        return None
    labels = [i if part is not None else IGNORED for i, part in zip(ids, kept, strict=False)]
    return _example(ids[:max_length], labels, where, {**about[seen[-1]], "prompt_tokens": parts.index(seen[-1])})


def _example(ids: Sequence[int], labels: Sequence[int], where: str, about: dict[str, Any] | None = None) -> Example:
    array = as_ids(ids)
    return Example(array, array if ids is labels else as_ids(labels), where, about=about or {})


def pack(found: Examples) -> Examples:
    """The same examples, several to a window of at most ``max_length`` tokens, the longest first.

    Positions begin at 0 in each example, from which transformers' attention masks tell the examples of a window apart:
    none sees another. The first token of an example is not predicted, since the one before it belongs to another.
    """
    windows: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # (tokens left, index of the window), sorted
    for example in sorted(found.items, key=lambda e: -len(e.input_ids)):
        n = len(example.input_ids)
        at = bisect_left(room, (n, -1))  # the fullest window it fits in
        if at == len(room):
            left, window = found.max_length, len(windows)
            windows.append([])
        else:
            left, window = room.pop(at)
        windows[window].append(example)
        insort(room, (left - n, window))
    packed = Examples(**{**vars(found), "items": []})
    for together in windows:
        labels = [np.concatenate([[IGNORED], e.labels[1:]]) for e in together]
        packed.items.append(
            Example(
                np.concatenate([e.input_ids for e in together]),
                np.concatenate(labels).astype(np.int32),
                together[0].where,
                {"position_ids": np.concatenate([np.arange(len(e.input_ids), dtype=np.int32) for e in together])},
            )
        )
    return packed
