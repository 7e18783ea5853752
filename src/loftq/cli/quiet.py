"""Keeping other libraries' notices out of the command line's output."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

import typer

from loftq.errors import LoftQWarning


def quiet_libraries() -> None:
    """Before torch, transformers and PEFT are imported: no notices that a user can do nothing about, ours in one sentence."""
    # bitsandbytes, where installed, announces at import that an optional kernel package is missing
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(accelerate|transformers|peft)\.")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, LoftQWarning):  # in the words of the other notes, without a line of source
            typer.echo(f"loftq: {message}", err=True)
        else:
            shown(message, category, *where, **more)

    warnings.showwarning = show


def quiet_transformers() -> None:
    """After transformers is imported: its progress bars only on a terminal."""
    if not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
