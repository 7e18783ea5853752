"""GSM8K: is the number that a generated solution arrives at the right one (Cobbe et al., arXiv:2110.14168).

A reference solution ends with ``#### 18``. The answer of a generated text is the first number after its first answer
marker, or its last number where there is no marker, or no number after it. Numbers are compared as numbers: 18, 18.0,
"18.", "$18" and "18%" are equal, and so are 70,000 and 70000.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal

from loftq.errors import SourceError
from loftq.evaluate.metrics import check_pairs, share_error

REFERENCE_MARKER = "####"
# What LoftQ's authors train in place of the reference's marker, with the colon and the space that follow it.
PUBLISHED_MARKER = "The final answer is: "
MARKERS = (REFERENCE_MARKER, PUBLISHED_MARKER.rstrip(": "))

Extract = Callable[[str], Decimal | None]

# A minus is a sign where nothing that it could be subtracted from ends before it: "10-3" holds 10 and 3, "= -3" holds -3.
# A comma belongs to a number where it separates thousands: "1,234" is one number, "3,4" two. A full stop needs a digit
# behind it.
_NUMBER = re.compile(r"((?<![\w)\]%.])[-−])?[$€£]?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\w)\.\d+)")
_PUBLISHED_NUMBER = re.compile(r"-?\d+\.?\d*")


def reference_number(reference: str) -> Decimal:
    """The number after the last ``####`` of a reference solution, or of a text that is the number alone.

    Raises:
        SourceError: there is none.
    """
    found = _numbers(reference.rpartition(REFERENCE_MARKER)[2])
    if not found:
        raise SourceError(f"the reference {reference[-60:]!r} has no number after {REFERENCE_MARKER}, expected one")
    return found[0]


def answer_number(text: str) -> Decimal | None:
    """The number that a generated text gives as its answer, or ``None`` where it holds no number.

    The first marker counts, since a model may go on to further questions after its answer.
    """
    places = [(text.find(marker), len(marker)) for marker in MARKERS if marker in text]
    if places:
        begin, length = min(places)
        after = _numbers(text[begin + length :])
        if after:
            return after[0]
    return next(reversed(_numbers(text)), None)


def published_number(text: str) -> Decimal | None:
    """As :func:`answer_number`, by the rule of ``test_gsm8k.py`` in the LoftQ authors' repository.

    It differs in three things: the only marker is ``The final answer is: ``, with the number before the next one;
    all commas are dropped, so that "3, 4" holds 3 and 4 but "3,4" is 34; and every minus before a digit is a sign, so
    that "10-3" ends with -3.
    """
    plain = text.replace(",", "")
    found = _PUBLISHED_NUMBER.findall(plain)
    segments = plain.split(PUBLISHED_MARKER)
    after = _PUBLISHED_NUMBER.findall(segments[1]) if len(segments) > 1 else []
    if after:
        return Decimal(after[0])
    return Decimal(found[-1]) if found else None


def is_correct(output: str, reference: str, extract: Extract = answer_number) -> bool:
    """Whether a generated text's number is the reference's.

    Raises:
        SourceError: the reference has no number.
    """
    return extract(output) == reference_number(reference)


def accuracy(
    outputs: Sequence[str], references: Sequence[str], *, extract: Extract = answer_number
) -> dict[str, float | int]:
    """Share of right answers.

    Args:
        outputs: generated texts, without their prompts. references: reference solutions, or their numbers alone.
        extract: :func:`answer_number`, or :func:`published_number` to compare with the paper's table.

    Returns:
        ``accuracy`` and its standard error ``accuracy_se`` in percent, and how many of the ``count`` outputs are
        ``correct`` or ``without_number``; the latter are wrong.

    Raises:
        ConfigError: for no outputs, or unequally many outputs and references. SourceError: a reference has no number.
    """
    check_pairs("references", len(outputs), len(references))
    answers = [extract(output) for output in outputs]
    correct = sum(answer == reference_number(r) for answer, r in zip(answers, references, strict=True))
    share = correct / len(answers)
    return {
        "accuracy": 100 * share,
        "accuracy_se": 100 * share_error(share, len(answers)),
        "correct": correct,
        "without_number": answers.count(None),
        "count": len(answers),
    }


def _numbers(text: str) -> list[Decimal]:
    return [Decimal(("-" if sign else "") + digits.replace(",", "")) for sign, digits in _NUMBER.findall(text)]
