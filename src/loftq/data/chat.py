"""Conversations in the chat template of a model: which parts of them are learned, and how a turn of the assistant ends."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from typing import Any

from loftq.data.examples import Examples
from loftq.data.language import add_learned, encode_spans
from loftq.data.rows import Row
from loftq.errors import ConfigError, SourceError, first_line

Messages = list[dict[str, str]]
Rendered = tuple[str, dict[int, tuple[int, int]]]
"""A text, and where in it the assistant speaks: message -> span."""


def chat_examples(rows: Iterable[Row], tokenizer: Any, max_length: int) -> Examples:
    """Conversations in the model's chat template; what the assistant says, up to the end of its turn, is predicted.

    A conversation is one example. Where the template renders a turn otherwise once others follow it, as those that leave out
    earlier thoughts do, the conversation up to that turn is an example of its own: it is what the model sees and is asked
    for when it answers.

    Raises:
        ConfigError: the tokenizer has no chat template. SourceError: the template refuses a conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("the model's tokenizer has no chat template; use the task completion, or an instruct model")
    found = Examples("chat", max_length)
    ends = {tokenizer.eos_token_id, *turn_ends(tokenizer)}
    for row in rows:
        messages = _messages(row)
        texts = []
        for text, spans in _render(tokenizer, messages, row.where, found):
            ids, parts = encode_spans(tokenizer, text, list(spans.values()), special=False)
            # the answer as it is learned: a template may put an empty thought before it, or leave spaces out
            said = [[t for t, part in zip(ids, parts, strict=True) if part == n] for n in range(len(spans))]
            answers = [
                tokenizer.decode(list(takewhile(lambda t: t not in ends, s)), skip_special_tokens=True) for s in said
            ]
            about = [{"prompt": messages[:i], "reference": a} for i, a in zip(spans, answers, strict=True)]
            texts.append((ids, parts, about))
        add_learned(found, row.where, texts)
    return found


def _messages(row: Row) -> Messages:
    if "messages" in row.values:
        return row.values["messages"]
    return [
        {"role": "user", "content": row.values["prompt"]},
        {"role": "assistant", "content": row.values["completion"]},
    ]


def _render(tokenizer: Any, messages: Messages, where: str, found: Examples) -> list[Rendered]:
    """The whole conversation, and its beginnings up to those turns of the assistant that later ones change.

    A turn of the assistant is what rendering it adds to the rendering of all before it with the generation prompt. Where it
    is no addition, it cannot be told from the prompt, which is noted. What the assistant says before anybody else answers
    nothing and is not learned.
    """
    turns: dict[int, tuple[str, tuple[int, int]]] = {}
    asked = [i for i, message in enumerate(messages) if i > 0 and message["role"] == "assistant"]
    try:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        for i in asked:
            before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
            after = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
            if after.startswith(before):
                turns[i] = after, (len(before), len(after.rstrip()))
    except Exception as error:  # a template is a program of its own
        raise SourceError(
            f"{where} has messages that the chat template refuses ({first_line(error)}); repair or remove it"
        ) from None
    if not turns:
        raise SourceError(
            f"{where} is rendered by the chat template so that the assistant's turn cannot be told from the prompt; use "
            f"the task completion"
        )
    for _ in range(len(asked) - len(turns)):
        found.was_untold(where)
    rendered: list[Rendered] = []
    texts = [whole, *(turns[i][0] for i in reversed(turns))]
    while turns:
        text = texts.pop(0)
        spans = {i: span for i, (after, span) in turns.items() if text.startswith(after[: span[1]])}
        turns = {i: turn for i, turn in turns.items() if i not in spans}
        rendered += [(text, spans)] if spans else []
    return rendered[::-1]  # in the order of the conversation


def turn_ends(tokenizer: Any) -> list[int]:
    """The id of the token with which the chat template ends a turn of the assistant, such as ``<|im_end|>``, in a list.

    The list is empty where the turn ends with no token that was added for such a purpose, or there is no template.
    """
    said = "The answer."
    messages = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": said}]
    try:
        begin, _, end = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(said)
    except Exception:  # a template that wants other messages, or none
        return []
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    purposeful = (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}
    ids = tokenizer(end, add_special_tokens=False, verbose=False).input_ids if begin else []
    return next(([i] for i in ids if i in purposeful), [])
