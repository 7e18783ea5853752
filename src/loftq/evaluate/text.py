"""Text to evaluate on: a file, or English that every Python has."""

from __future__ import annotations

import os
import re
from pathlib import Path

from loftq.errors import SourceError

# The built-in text is the documentation topics of the standard library, in alphabetical order. Their number and wording
# differ between Python versions, so a slice is a share of the whole rather than a list of names.
BUILTIN = "pydoc"


def builtin_text() -> str:
    """The prose of ``pydoc_data.topics``: paragraphs of plain sentences, without grammars, code and rulers."""
    from pydoc_data.topics import topics

    paragraphs = []
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            lines = paragraph.strip().splitlines()
            text = " ".join(line.strip() for line in lines)
            letters = sum(c.isalpha() or c.isspace() for c in text)
            if len(text) > 120 and letters > 0.85 * len(text) and text[0].isupper() and "  " not in text:
                paragraphs.append(text)
    return "\n\n".join(paragraphs)


def read_text(name: str) -> str:
    """``pydoc``, or the contents of a UTF-8 file.

    Raises:
        SourceError: no such file, unreadable, not UTF-8, or empty.
    """
    if name == BUILTIN:
        return builtin_text()
    path = Path(os.path.expanduser(name))
    if not os.path.isfile(path):  # unlike pathlib's, this says no to a name that is too long: a text in place of a file
        shown = name if len(name) <= 80 else f"{name[:79]}…"
        raise SourceError(f"text {shown!r} is no file, expected a UTF-8 text file or {BUILTIN!r} for the built-in text")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 at byte {error.start}; convert it first") from None
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror or error}); check its permissions") from None
    if not text.strip():
        raise SourceError(f"{path} is empty, expected text")
    return text
