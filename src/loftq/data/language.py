"""Examples for language models: running text in windows, prompts with completions, and conversations.

The loss mask of the latter two lets a model learn answers only. Where an answer begins is decided on characters: a token
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
from loftq.errors import ConfigError, SourceError, first_line

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
        _add(found, row, ids, parts, [{"prompt": prompt, "reference": completion}])
    return found


def chat_examples(rows: Iterable[Row], tokenizer: Any, max_length: int) -> Examples:
    """Conversations in the model's chat template; what the assistant says, up to the end of its turn, is predicted.

    Raises:
        ConfigError: the tokenizer has no chat template. SourceError: the template refuses a conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("the model's tokenizer has no chat template; use the task completion, or an instruct model")
    found = Examples("chat", max_length)
    for row in rows:
        messages = _messages(row)
        text, spans = _render(tokenizer, messages, row.where)
        ids, parts = encode_spans(tokenizer, text, list(spans.values()), special=False)
        _add(found, row, ids, parts, [{"prompt": messages[:i], "reference": messages[i]["content"]} for i in spans])
    return found


def _messages(row: Row) -> list[dict[str, str]]:
    if "messages" in row.values:
        return row.values["messages"]
    return [
        {"role": "user", "content": row.values["prompt"]},
        {"role": "assistant", "content": row.values["completion"]},
    ]


def _render(tokenizer: Any, messages: list[dict[str, str]], where: str) -> tuple[str, dict[int, tuple[int, int]]]:
    """The conversation as text, and where in it the assistant speaks: message -> span.

    A turn of the assistant is what rendering it adds to the rendering of all before it with the generation prompt. Some
    templates leave out thoughts or repeat a system prompt: then a turn is no addition, and only the last one is known. What
    the assistant says before anybody else answers nothing and is not learned.
    """
    try:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        spans = {}
        for i, message in enumerate(messages):
            if i == 0 or message["role"] != "assistant":
                continue
            before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
            after = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
            if after.startswith(before) and whole.startswith(after.rstrip()):
                spans[i] = len(before), len(after.rstrip())
    except Exception as error:  # a template is a program of its own
        raise SourceError(
            f"{where} has messages that the chat template refuses ({first_line(error)}); repair or remove it"
        ) from None
    if not spans:
        raise SourceError(
            f"{where} is rendered by the chat template so that the assistant's turn cannot be told from the prompt; use "
            f"the task completion"
        )
    return whole, spans


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


def _add(found: Examples, row: Row, ids: list[int], parts: list[int | None], about: Sequence[dict[str, Any]]) -> None:
    """Add an example that learns the tokens of all parts, with what is known about the last part that is not cut away."""
    kept = parts[: found.max_length]
    seen = [part for part in kept[1:] if part is not None]
    if not seen:
        found.was_dropped(row.where)
        return
    if len(ids) > found.max_length:
        found.was_cut(row.where)
    labels = [i if part is not None else IGNORED for i, part in zip(ids, kept, strict=False)]
    chosen = {**about[seen[-1]], "prompt_tokens": parts.index(seen[-1])}
    found.add([_example(ids[: found.max_length], labels, row.where, chosen)])


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
