"""Examples for extractive question answering: overlapping windows of the context, each with the answer's tokens if inside."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from loftq.data.examples import Example, Examples, as_ids
from loftq.data.rows import Row
from loftq.errors import ConfigError, SourceError


def question_examples(rows: Iterable[Row], tokenizer: Any, max_length: int, *, doc_stride: int = 128) -> Examples:
    """Question and context in windows of ``max_length`` tokens, of which neighbours share ``doc_stride``.

    The label of a window is (start, end) of the first gold answer in its tokens, both inclusive, or (0, 0), the position of
    the first token, where the answer is not wholly inside (BERT, arXiv 1810.04805, section 4.2). ``about`` keeps what turns
    positions into text again: ``offsets`` maps the tokens of the context to characters and others to ``None``.

    Raises:
        SourceError: an answer that is not where the row says, or a question that leaves no room for its context.
        ConfigError: a stride that leaves no room.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{type(tokenizer).__name__} cannot say which characters a token stands for, expected a fast tokenizer"
        )
    found = Examples("qa", max_length)
    first = tokenizer.padding_side == "right"  # XLNet's family puts the context first
    for number, row in enumerate(rows):
        question, context, answers = row.values["question"].strip(), row.values["context"], row.values["answers"]
        for text, start in zip(answers["text"], answers["answer_start"], strict=True):
            if context[start : start + len(text)] != text:
                there = context[start : start + len(text)]
                raise SourceError(
                    f"{row.where}: the answer {_short(text)} is not at character {start} of the context, which has "
                    f"{_short(there)} there; repair or remove it"
                )
        room = max_length - len(tokenizer(question, verbose=False).input_ids) - 2
        if room <= doc_stride:
            raise SourceError(
                f"{row.where}: the question leaves {max(room, 0)} of {max_length} tokens for its context, expected more than "
                f"the stride of {doc_stride}; raise --max-length or lower --doc-stride"
            )
        encoded = tokenizer(
            *((question, context) if first else (context, question)),
            truncation="only_second" if first else "only_first",
            max_length=max_length,
            stride=doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        # no token stands for the spaces around an answer
        answer = answers["text"][0]
        start = answers["answer_start"][0] + len(answer) - len(answer.lstrip())
        stop = answers["answer_start"][0] + len(answer.rstrip())
        identifier = row.values.get("id", str(number))
        windows = []
        for i, ids in enumerate(encoded["input_ids"]):
            inside = [part == (1 if first else 0) for part in encoded.sequence_ids(i)]
            offsets = [o if mine else None for o, mine in zip(encoded["offset_mapping"][i], inside, strict=True)]
            types = {"token_type_ids": as_ids(encoded["token_type_ids"][i])} if "token_type_ids" in encoded else {}
            about = {
                "id": identifier,
                "number": number,
                "offsets": offsets,
                "context": context,
                "question": question,
                "answers": answers["text"],
            }
            windows.append(Example(as_ids(ids), _span(offsets, start, stop), row.where, types, about))
        found.add(windows)
    return found


def _span(offsets: list[tuple[int, int] | None], start: int, stop: int) -> tuple[int, int]:
    """First and last token with characters of [start, stop), or (0, 0) where not all of them are in the window."""
    known = [(i, o) for i, o in enumerate(offsets) if o is not None and o[0] < o[1]]
    if not known or known[0][1][0] > start or known[-1][1][1] < stop:
        return 0, 0
    inside = [i for i, (a, b) in known if a < stop and b > start]
    return (inside[0], inside[-1]) if inside else (0, 0)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")
