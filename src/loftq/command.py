"""The command line in a process of its own, so that its time and peak memory are its own."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from loftq.errors import LoftQError


def run_loftq(arguments: Sequence[str]) -> dict[str, Any]:
    """Run ``loftq ARGUMENTS``, which must have ``--json`` among them, and return what it prints.

    Raises:
        LoftQError: it failed; its own message is on stderr.
    """
    command = [sys.executable, "-m", "loftq.cli", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise LoftQError(
            f"`loftq {shlex.join(arguments)}` failed with exit code {done.returncode}; see its message above"
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return found
