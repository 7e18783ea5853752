"""Keeping other libraries' notices out of the command line's output."""

from __future__ import annotations

import logging
import sys
import warnings


def quiet_libraries() -> None:
    """Before torch, transformers and PEFT are imported: no notices that a user can do nothing about."""
    # bitsandbytes, where installed, announces at import that an optional kernel package is missing
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(accelerate|transformers|peft)\.")
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def quiet_transformers() -> None:
    """After transformers is imported: its progress bars only on a terminal."""
    if not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
