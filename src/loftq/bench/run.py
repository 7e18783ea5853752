"""All suites in turn, and their results as JSON: machine, versions, every repeat, and the bounds."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loftq.bench import rival
from loftq.bench.bounds import REPEATS, THREADS, Judged, judge
from loftq.bench.case import Case, Options
from loftq.config import one_of, positive_int
from loftq.report.system import machine, versions

SUITES = ("dequantize", "linear", "solver", "model")


def check(suites: Sequence[str], options: Options) -> tuple[str, ...]:
    """The suites to run, all where none is named.

    Raises:
        ConfigError: for an unknown suite, or fewer than one repeat.
    """
    for suite in suites:
        one_of("SUITE", suite, SUITES)
    positive_int("repeats", options.repeats)
    return tuple(s for s in SUITES if s in suites) or SUITES


class Bench:
    """Runs suites and gathers what they find.

    Attributes:
        suites: that run, in order.
        options: theirs.
        cases, judged: what was measured so far, and the bounds on it.
        skipped: sentences on what was left out.
    """

    def __init__(self, suites: Sequence[str], options: Options, command: str | None = None) -> None:
        self.suites = check(suites, options)
        self._told = options.notice
        self.options = replace(options, notice=self._notice)
        self.command = command
        self.load = list(os.getloadavg()) if hasattr(os, "getloadavg") else []
        self.cases: list[Case] = []
        self.judged: list[Judged] = []
        self.skipped: list[str] = []

    def _notice(self, sentence: str) -> None:
        if sentence not in self.skipped:
            self.skipped.append(sentence)
            self._told(sentence)

    def unjudged(self) -> str | None:
        """Why the bounds do not apply to this run; ``None`` where they do."""
        if self.options.quick:
            return "the bounds are for the full shapes"
        if self.options.repeats < REPEATS:
            return f"the bounds are for medians of at least {REPEATS} repeats"
        if torch.get_num_threads() != THREADS:
            return f"the bounds are for {THREADS} threads, here are {torch.get_num_threads()}; set OMP_NUM_THREADS"
        return None

    def run(self) -> Iterator[tuple[Case, list[Judged]]]:
        """Each case when it is measured, with the bounds on it where they apply."""
        if (reason := self.unjudged()) is not None:
            self._notice(reason)
        for suite in self.suites:
            for case in importlib.import_module(f"loftq.bench.{suite}").run(self.options):
                found = [] if reason is not None else judge(case)
                self.cases.append(case)
                self.judged += found
                yield case, found

    def title(self, suite: str) -> str:
        """One line on a suite's shapes."""
        line: str = importlib.import_module(f"loftq.bench.{suite}").title(self.options)
        return line

    def to_dict(self) -> dict[str, Any]:
        rivals = {"bitsandbytes": found} if (found := rival.version()) else {}
        return {
            "command": self.command,
            "machine": {**machine(), "load before": self.load},
            "versions": {**versions(), **rivals},
            "repeats": self.options.repeats,
            "quick": self.options.quick,
            "suites": {suite: self.title(suite) for suite in self.suites},
            "cases": [case.to_dict() for case in self.cases],
            "bounds": [judged.to_dict() for judged in self.judged],
            "skipped": self.skipped,
        }

    def save(self, path: Path) -> None:
        """Write the results so far, in place of earlier ones.

        Raises:
            OutputError: the file cannot be written.
        """
        import json

        from loftq.checkpoint.writer import disk_errors, replace_text

        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, json.dumps(self.to_dict(), indent=1) + "\n")
