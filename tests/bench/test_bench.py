"""``loftq bench`` with small shapes: what it measures, what it holds against the bounds, and what it leaves out."""

from __future__ import annotations

import json
import runpy
import statistics
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from loftq.bench import bounds, dequantize, model, rival, solver
from loftq.bench.bounds import BOUNDS, Bound, judge
from loftq.bench.case import BYTES, RELATIVE, Case, Options
from loftq.bench.run import SUITES, Bench
from loftq.bench.timing import in_turns
from loftq.bench.units import amount
from loftq.cli import app, main
from loftq.command import run_loftq
from loftq.errors import ConfigError, LoftQError, OutputError

QUICK = Options(repeats=1, quick=True)


@pytest.fixture(scope="module")
def measured() -> list[Case]:
    """Every case of the suites that run in this process."""
    return [case for case, _ in Bench(("dequantize", "linear", "solver"), QUICK).run()]


def test_candidates_take_turns():
    calls = []
    found = in_turns({name: partial(calls.append, name) for name in "abcd"}, 5)
    turns = [calls[i : i + 4] for i in range(0, len(calls), 4)]  # the first one warms up
    assert [sorted(turn) for turn in turns] == [list("abcd")] * 6
    assert len(set(map(tuple, turns))) > 2, "every turn has an order of its own"
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys("abcd", 5)
    assert all(value > 0 for values in found.values() for value in values)
    calls.clear()
    assert len(in_turns({"a": lambda: calls.append("a")}, 2, warm_up=False)["a"]) == len(calls) == 2
    assert 7 < len(in_turns({"quick": lambda: None}, 7, seconds=0.1)["quick"]) <= 50


def test_medians_spread_and_ratios():
    case = Case("linear", "c", {"dense": (4.0, 1.0, 2.0, 3.0, 9.0), "2 bits": (6.0,)})
    assert case.median("dense") == 3
    assert case.spread("dense") == pytest.approx((4 - 2) / 2 / 3)  # quartiles 2 and 4
    assert case.spread("2 bits") is None
    assert case.ratio("2 bits", "dense") == 2
    assert case.ratio("2 bits", "bitsandbytes") is None
    assert case.to_dict()["candidates"]["dense"]["repeats"] == [4, 1, 2, 3, 9]


@pytest.mark.parametrize(
    ("bound", "seconds", "value", "met", "text"),
    [
        ({"at_most": 0.007}, 0.007, 0.007, True, "at most 7 ms: met (7 ms)"),
        ({"at_most": 0.007}, 0.008, 0.008, False, "at most 7 ms: missed (8 ms)"),
        ({"at_most": 1.2, "against": "dense"}, 0.012, 1.2, True, "at most 1.2 × dense: met (1.2)"),
        ({"at_most": 1.2, "against": "dense"}, 0.013, 1.3, False, "at most 1.2 × dense: missed (1.3)"),
        ({"times_faster": 5, "against": "dense"}, 0.002, 5, True, "at least 5 × faster than dense: met (5)"),
        ({"times_faster": 5, "against": "dense"}, 0.004, 2.5, False, "at least 5 × faster than dense: missed (2.5)"),
        ({"times_faster": 5, "against": "absent"}, 1.0, None, None, "at least 5 × faster than absent: not measured"),
    ],
)
def test_a_bound(monkeypatch, bound, seconds, value, met, text):
    monkeypatch.setattr(bounds, "BOUNDS", (Bound("s", "c", "ours", **bound), Bound("s", "other", "ours", at_most=1)))
    (found,) = judge(Case("s", "c", {"ours": (seconds,), "dense": (0.01,)}))
    assert found.value == pytest.approx(value)
    assert (found.met, found.text) == (met, text)


def test_every_bound_is_on_something_measured(measured):
    pytest.importorskip("bitsandbytes")
    candidates = {(case.suite, case.name): set(case.values) for case in measured}
    if not rival.repacks(rival.linear(torch.randn(64, 64), torch.float32, training=False)):
        for case in [c for c in candidates if c[0] == "linear"]:
            candidates[case].add(bounds.RIVAL_EVAL)
    for bound in BOUNDS:
        if bound.suite in ("dequantize", "linear", "solver"):
            named = {bound.candidate, bound.against} - {None}
            assert named <= candidates[bound.suite, bound.case], bound
    assert {bound.suite for bound in BOUNDS} == {*SUITES, "large"}


def test_the_errors_of_block_and_exact_svd_are_beside_their_times(measured):
    cases = {case.name: case for case in measured if case.suite == "solver"}
    for bits in solver.WIDTHS:
        error = cases[f"half the width, {bits} bits, error"]
        assert error.unit == RELATIVE
        assert error.median("exact SVD") <= error.median("default") < 1.02 * error.median("exact SVD")
    assert cases["half the width, 4 bits, error"].median("default") < 0.1 < error.median("default") * 3


def test_packed_matrices_are_what_is_timed(monkeypatch):
    """The candidates of ``dequantize`` write the matrix that the codes stand for, to memory that exists or to fresh one."""
    results: dict[str, torch.Tensor] = {}

    def once(candidates, repeats, **_):
        for name, candidate in candidates.items():
            results[name] = candidate().clone()
        return dict.fromkeys(candidates, (1.0,))

    monkeypatch.setattr(dequantize, "in_turns", once)
    next(dequantize.run(QUICK))
    size = dequantize.QUICK_SIZE
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    expected = {
        "2 bits": 0.35,
        "3 bits": 0.18,
        "4 bits": 0.095,
        "8 bits": 0.008,
    }  # about what such a matrix is rounded by
    for name, largest in expected.items():
        torch.testing.assert_close(results[name], results[f"{name}, fresh"], rtol=0, atol=0)
        error = float((results[name] - weight).norm() / weight.norm())
        assert largest / 2 < error < largest, (name, error)


def test_the_rivals_layers_compute_their_matrix_and_are_apart():
    pytest.importorskip("bitsandbytes")
    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(1))
    training = rival.linear(weight, torch.float32, training=True)
    inference = rival.linear(weight, torch.float32, training=False)
    stored = training.weight.shape
    for layer in (inference, training):
        with torch.no_grad():
            error = float((layer(x) - x @ weight.T).norm() / (x @ weight.T).norm())
        assert error < 0.12, error  # NF4 rounds a normal matrix by 0.09
    assert training.weight.shape == stored, "the layer in training mode was repacked"
    if rival.repacks(inference):
        assert inference.weight.shape != stored
    asked = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(training(asked), asked, torch.ones(4, 128))
    assert float((grad - torch.ones(4, 128) @ weight).norm() / grad.norm()) < 0.12


def test_without_bitsandbytes(monkeypatch):
    monkeypatch.setattr(rival, "version", lambda: None)
    said: list[str] = []
    bench = Bench(("dequantize", "linear"), Options(1, True, said.append))
    cases = [case for case, _ in bench.run()]
    assert said == bench.skipped == ["the bounds are for the full shapes", rival.MISSING]
    assert not [name for case in cases for name in case.values if "bitsandbytes" in name]
    assert "bitsandbytes" not in bench.to_dict()["versions"]


def test_without_the_model(monkeypatch):
    monkeypatch.setattr("loftq.checkpoint.default_model.default_model_at_hand", lambda: False)
    said: list[str] = []
    assert list(model.run(Options(notice=said.append))) == []
    assert said == [model.ABSENT]


def test_missed_bounds_are_a_result_and_no_error(monkeypatch, tmp_path):
    """Full mode with a small matrix: bounds are judged, printed, and saved."""
    monkeypatch.setattr(dequantize, "SIZE", 128)
    monkeypatch.setattr(Options, "seconds", 0.0)
    monkeypatch.setattr("loftq.bench.run.THREADS", torch.get_num_threads())
    impossible = (
        Bound("dequantize", "to float32", "2 bits", at_most=1e-12),
        Bound("dequantize", "to float32", "3 bits", at_most=1e3),
    )
    monkeypatch.setattr(bounds, "BOUNDS", impossible)
    out = tmp_path / "new" / "bench.json"
    done = CliRunner().invoke(app, ["bench", "dequantize", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "1 bounds met, 1 missed, 0 not measured" in done.stdout
    assert "missed (" in done.stdout
    saved = json.loads(out.read_text())
    assert [(b["candidate"], b["met"]) for b in saved["bounds"]] == [("2 bits", False), ("3 bits", True)]
    assert saved["skipped"] == []
    for case in saved["cases"]:
        for candidate in case["candidates"].values():
            assert len(candidate["repeats"]) >= 7
            assert candidate["median"] == statistics.median(candidate["repeats"])
    assert {"cpu", "threads", "os", "load before"} == set(saved["machine"])
    assert {"python", "torch", "loftq"} <= set(saved["versions"])


@pytest.mark.parametrize(
    ("options", "threads", "reason"),
    [
        (Options(quick=True), 2, "full shapes"),
        (Options(repeats=3), 2, "at least 7 repeats"),
        (Options(), 5, "for 2 threads, here are 5"),
        (Options(), 2, None),
    ],
)
def test_when_bounds_do_not_apply(monkeypatch, options, threads, reason):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    said = Bench((), options).unjudged()
    assert (said is None) if reason is None else (reason in said)


def test_json_on_standard_output_and_nothing_else():
    done = CliRunner().invoke(app, ["bench", "solver", "--quick", "--repeats", "1", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["quick"], found["repeats"], list(found["suites"])) == (True, 1, ["solver"])
    assert "solver: decompose, 2 bits: default" in done.stderr


def test_mistakes(monkeypatch, capsys, tmp_path):
    with pytest.raises(ConfigError, match="SUITE is 'speed', expected"):
        Bench(("speed",), QUICK)
    with pytest.raises(ConfigError, match="repeats"):
        Bench((), Options(repeats=0))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file is a file, expected a folder"):
        Bench((), QUICK).save(tmp_path / "file" / "bench.json")
    monkeypatch.setattr(sys, "argv", ["loftq", "bench", "speed"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip().startswith("loftq: SUITE is 'speed'")


def test_amounts():
    shown = [amount(2e-5, "s"), amount(5.27e-3, "s"), amount(1.234, "s"), amount(1800, "s"), amount(2.5e9, BYTES)]
    assert shown == ["20 µs", "5.27 ms", "1.23 s", "1800 s", "2.5 GB"]
    assert amount(0.28349, RELATIVE) == "0.2835"


@pytest.mark.slow  # the command line in a process of its own
def test_a_whole_model():
    found = run_loftq(["bench", "model", "--quick", "--repeats", "2", "--json"])
    cases = {case["case"]: case for case in found["cases"]}
    for bound in BOUNDS:
        if bound.suite == "model":
            assert {bound.candidate, bound.against} - {None} <= set(cases[bound.case]["candidates"]), bound
    # Python and torch alone take 0.2 GB; the libraries that quantizing imports and a tiny model less than a GB more
    memory = cases["quantize, memory above Python and torch"]["candidates"]["2 bits"]["median"]
    assert 5e7 < memory < 1e9, memory
    assert cases["greedy decoding"]["tokens"] == model.QUICK_NEW_TOKENS
    with pytest.raises(LoftQError, match="`loftq bench speed --json` failed with exit code 2"):
        run_loftq(["bench", "speed", "--json"])


def test_make_bench_replaces_the_files_that_the_readme_quotes():
    """Every suite once, and every file of results linked from where its numbers are read."""
    from loftq.bench.run import check

    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    commands = runpy.run_path(str(folder / "run.py"))["COMMANDS"].values()
    calls = [words[words.index("bench") + 1 :] for words in commands if "bench" in words]
    suites = [suite for words in calls for suite in check(words[: words.index("--out")], QUICK)]
    assert sorted(suites) == sorted(SUITES)
    readme = (folder / "README.md").read_text(encoding="utf-8")
    for words in calls:
        file = Path(words[-1])
        assert file.is_file(), file
        assert f"](results/{file.name})" in readme
