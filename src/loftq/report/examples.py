"""Training examples on a terminal: what is learned stands out, in colour where there is any and in brackets everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from loftq.data.check import Shown
from loftq.report.tables import console, table

_LONGEST = 400
"""Tokens of an example that are shown; the middle of a longer one is left out."""


def print_example(where: str, tokens: Sequence[Shown], label: str | None) -> None:
    """One example: its place, its tokens, and what is predicted beside them."""
    out = console()
    out.print(Text(where, style="bold"))
    out.print(marked(tokens))
    if label is not None:
        out.print(Text("→ ") + Text(label, style="green"))
    out.print()


def marked(tokens: Sequence[Shown]) -> Text:
    """The tokens as text with ``·`` between them, runs of learned ones in ⟦ ⟧."""
    if len(tokens) > _LONGEST:
        half = _LONGEST // 2
        gap = Shown(-1, f" … {len(tokens) - 2 * half} tokens … ", False)
        tokens = [*tokens[:half], gap, *tokens[-half:]]
    text, inside = Text(), False
    for number, token in enumerate(tokens):
        if token.learned != inside:
            text.append("⟦" if token.learned else "⟧")
            inside = token.learned
        elif number:
            text.append("·", style="dim")
        text.append(token.text, style="green" if inside else "")
    if inside:
        text.append("⟧")
    return text


def print_summary(totals: dict[str, Any], notes: Sequence[str]) -> None:
    """Counts of a split, and one sentence for each thing that happened to rows."""
    out = console()
    labels = totals.get("labels")
    rows = [[name.replace("_", " "), _shown(value)] for name, value in totals.items() if name != "labels"]
    out.print(table({"": "left", "  ": "right"}, rows))
    if labels:
        whole = sum(labels.values())
        out.print(
            table(
                {"label": "left", "examples": "right", "%": "right"},
                [[name, f"{count:,}", f"{100 * count / whole:.1f}"] for name, count in labels.items()],
            )
        )
    for note in notes:
        out.print(note)


def _shown(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, (int, float)) else str(value)
