"""Plain lines where there is no terminal, by a clock that the test moves."""

from __future__ import annotations

import pytest

from loftq.report import progress
from loftq.report.progress import Lines, amount, bar, duration


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def lines(clock: Clock, *arguments, **options) -> tuple[Lines, list[str]]:
    said: list[str] = []
    return Lines(*arguments, **options, clock=clock, write=said.append), said


def test_a_line_at_the_start_one_a_minute_and_one_at_the_end(clock):
    work, said = lines(clock, 100, "training (loftq)", "steps")
    assert said == ["training (loftq): 0 of 100 steps"]
    for _ in range(99):
        clock.now += 2
        work.advance("loss 1.2500", 1)
    assert said[1:] == [
        "training (loftq): 30 of 100 steps, 0.50 steps/s, about 140 s left (loss 1.2500)",
        "training (loftq): 60 of 100 steps, 0.50 steps/s, about 80 s left (loss 1.2500)",
        "training (loftq): 90 of 100 steps, 0.50 steps/s, about 20 s left (loss 1.2500)",
    ]
    clock.now += 100
    work.advance("", 1)  # no line here: the last one follows at once
    work.end()
    assert said[4:] == ["training (loftq): 100 of 100 steps in 298 s, 0.34 steps/s"]


def test_what_an_earlier_run_has_done_does_not_count_for_the_rate(clock):
    work, said = lines(clock, 4_000_000, "quantizing", "weights", 3_000_000)
    clock.now += 100
    work.advance("model.layers.3", 100_000)
    assert said == [
        "quantizing: 75 % of 4.0 Mweights",
        "quantizing: 77 % of 4.0 Mweights, 1.0 kweights/s, about 15 min left (model.layers.3)",
    ]


def test_work_in_other_work_speaks_only_after_a_minute(clock):
    work, said = lines(clock, 10, "measuring", "examples", is_inner=True)
    work.advance("", 1)
    assert said == []
    clock.now += 61
    work.advance("", 1)
    work.end()
    assert said == ["measuring: 2 of 10 examples, 0.03 examples/s, about 244 s left"]


def test_work_that_stops_early_and_none_at_all(clock):
    work, said = lines(clock, 40, "training (full)", "steps")
    clock.now += 0.25
    work.advance("", 3)
    work.end()
    assert said[-1] == "training (full): 3 of 40 steps in 0 s"
    nothing, said = lines(clock, 0, "blocks", "tokens")
    nothing.end()
    assert said == ["blocks: 0 of 0 tokens", "blocks: 0 of 0 tokens in 0 s"]


def test_bars_without_a_terminal(capsys):
    with bar(2, "training", "steps", done=1) as outer:
        with bar(5, "measuring", "examples") as inner:
            inner("", 5)
        outer("", 1)
    with bar(5, "measuring", "examples", show=False) as hidden:
        hidden("", 5)
    with pytest.raises(KeyboardInterrupt), bar(5, "evaluating", "tokens"):
        raise KeyboardInterrupt
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "loftq: training: 1 of 2 steps",
        "loftq: training: 2 of 2 steps in 0 s",
        "loftq: evaluating: 0 of 5 tokens",
    ]
    assert progress._depth == 0


def test_amounts():
    assert [amount(n, "weights") for n in (0.25, 3, 2500, 3.4e6, 7e9)] == [
        "0.25 weights",
        "3.0 weights",
        "2.5 kweights",
        "3.4 Mweights",
        "7.0 Gweights",
    ]
    assert [duration(s) for s in (0, 40, 299, 720, 11_100)] == ["0 s", "40 s", "299 s", "12 min", "3 h 5 min"]
