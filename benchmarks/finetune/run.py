"""What a starting point is worth after fine-tuning: the same training from different starts, with several seeds.

    python benchmarks/finetune/run.py                        # every experiment: hours on two cores
    python benchmarks/finetune/run.py wikitext2 --jobs 2     # one; two runs at once, with one thread each
    python benchmarks/finetune/run.py sst2 --only loftq-2    # runs whose name contains this
    python benchmarks/finetune/run.py wikitext2_gpu --jobs 14 --device cuda --minutes 7    # on a GPU, for so long
    python benchmarks/finetune/run.py --plots-only

Every start is made by ``loftq quantize`` (and ``loftq refine``), every run by ``loftq train``; each takes a few minutes, and
what is finished is not repeated, here or where ``EXPERIMENT.json`` came from: it has a row for each run, and a row with the
same command stands for its run. The first seed of every method comes before the second of any, so that an experiment that
is stopped has the same seeds of all. `experiments.py` says what they are.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import experiments
from experiments import DATA, HERE, Experiment, Model, Run

from loftq.report.record import REPORT, QuantizationReport
from loftq.report.system import machine, versions

WORK = HERE / "work"
LOFTQ = shutil.which("loftq", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}") or "loftq"
_MAKING: dict[str, threading.Lock] = {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", help=f"{', '.join(experiments.EXPERIMENTS)}; all by default")
    parser.add_argument("--only", default="", help="runs whose name contains this")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; the threads are shared among them")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where starts are decomposed")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many")
    parser.add_argument("--plots-only", action="store_true")
    chosen = parser.parse_args()
    unknown = [name for name in chosen.experiments if name not in experiments.EXPERIMENTS]
    if unknown:
        parser.error(f"no experiment {unknown[0]}; expected {', '.join(experiments.EXPERIMENTS)}")
    if not DATA.is_dir():
        print(f"skipped: {DATA} is not here")
        return
    end = time.monotonic() + 60 * chosen.minutes
    for name in chosen.experiments or experiments.EXPERIMENTS:
        experiment = experiments.EXPERIMENTS[name]()
        if not chosen.plots_only:
            runs = [run for run in experiment.runs if chosen.only in run.name]
            perform(experiment, runs, chosen.jobs, chosen.device, end)
        from pictures import plot

        for picture in plot(experiment.name, experiment.metric):
            print(f"-> {picture}")


def perform(experiment: Experiment, runs: Iterable[Run], jobs: int, device: str, end: float) -> None:
    """The runs, ``jobs`` at once and none begun after ``end``; one that needs a start makes it, others wait for that."""
    folder = WORK / experiment.name
    folder.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    shared = experiment.options(folder)
    known = recorded(experiment).get("rows", [])
    rows = {row["command"]: row for row in known}
    rows = {
        run.name: rows[said]
        for run in experiment.runs
        if (said := plain(command(folder, experiment, run, shared))) in rows
    }
    left = sorted((run for run in runs if run.name not in rows), key=lambda run: run.seed)

    def one(run: Run) -> float | None:
        if time.monotonic() > end:
            return None
        return train(experiment, folder, run, shared, threads, device)

    with ThreadPoolExecutor(jobs) as pool:
        begun = {pool.submit(one, run): run for run in left}
        for done in as_completed(begun):
            run, seconds = begun[done], done.result()
            if seconds is None:
                print(f"{experiment.name}/{run.name}: not begun, the time is up", flush=True)
                continue
            print(f"{experiment.name}/{run.name}: {seconds:.0f} s", flush=True)
            rows[run.name] = row(experiment, folder, run)
            save(experiment, shared, rows)


def recorded(experiment: Experiment) -> dict[str, Any]:
    """What ``EXPERIMENT.json`` has, empty without one."""
    path = HERE / f"{experiment.name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def command(folder: Path, experiment: Experiment, run: Run, shared: dict[str, Any]) -> str:
    """Of a training, as a shell takes it."""
    start = ("--init-from", WORK / experiment.model.name / run.start, "--seed", run.seed)
    options = [
        word for key, value in {**shared, **run.options}.items() for word in (f"--{key.replace('_', '-')}", value)
    ]
    return shlex.join(map(str, ("loftq", "train", folder / run.name, "--method", run.method, *start, *options)))


def make(model: Model, start: str, device: str) -> None:
    """Make a start, and what it is made from before."""
    made = WORK / model.name
    folder = made / start
    with _MAKING.setdefault(str(folder), threading.Lock()):  # in one step, whoever comes first
        if folder.is_file() or (folder / REPORT).exists():
            return
        made.mkdir(parents=True, exist_ok=True)
        for command in model.commands(start, made):
            if isinstance(command, str):
                make(model, command, device)
            else:
                print(f"{model.name}/{start}", flush=True)
                on_gpu = ("--device", device) if device != "cpu" and command[0] == "quantize" else ()
                loftq(*command, *on_gpu)


def train(experiment: Experiment, folder: Path, run: Run, shared: dict[str, Any], threads: int, device: str) -> float:
    """One run, in a process of its own."""
    started = time.perf_counter()
    make(experiment.model, run.start, device)
    if not (folder / run.name / "training.json").exists():
        loftq(*shlex.split(command(folder, experiment, run, shared))[1:], threads=threads)
    for metric, extra in experiment.afterwards.items():
        record = folder / run.name / f"{metric}.json"
        if not record.exists():
            record.write_text(loftq("evaluate", folder / run.name, *extra, "--json", threads=threads))
    return time.perf_counter() - started


def loftq(*words: Any, threads: int | None = None) -> str:
    """Run a command and return what it printed."""
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run([LOFTQ, *map(str, words)], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(['loftq', *map(str, words)])}\n{done.stderr[-2000:]}")
    return done.stdout


def row(experiment: Experiment, folder: Path, run: Run) -> dict[str, Any]:
    """What a finished run was and gave."""
    record = json.loads((folder / run.name / "training.json").read_text(encoding="utf-8"))
    found = {k: record[k] for k in ("status", "before", "after", "best_step", "timing")}
    for metric in experiment.afterwards:
        after = json.loads((folder / run.name / f"{metric}.json").read_text(encoding="utf-8"))
        found["after"] = {**found["after"], **after["metrics"]}
    evaluations = {"command": plain(record["command"]), "evaluations": record["evaluations"]}
    curve = [round(point["loss"], 4) for point in record["curve"]]
    return {**run.labels, "seed": run.seed, **found, **evaluations, "curve": curve, "machine": where()}


def where() -> str:
    """The processor that decides how long it took, and how sums are rounded."""
    here = machine()
    return str(here.get("gpu", here["cpu"]))


def save(experiment: Experiment, shared: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    """Write the rows in the order of the runs, with the machine and versions that gave the last of them."""
    starts = recorded(experiment).get("bits_per_weight", {})
    for start in dict.fromkeys(run.start for run in experiment.runs):
        path = WORK / experiment.model.name / start
        if (path / REPORT).exists():
            starts[start] = round(QuantizationReport.load(path).bits_per_weight, 4)
    settings = {k: plain(str(v)) for k, v in shared.items()}
    result = {"title": experiment.title, "machine": machine(), "versions": versions(), "settings": settings}
    in_order = [rows[run.name] for run in experiment.runs if run.name in rows]
    path = HERE / f"{experiment.name}.json"
    partial = path.with_name(f".{path.name}.partial")
    text = json.dumps({**result, "bits_per_weight": starts, "rows": in_order}, indent=1)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def plain(command: Any) -> Any:
    """A command without the folders of the machine it ran on."""
    if not isinstance(command, str):
        return command
    for folder, shown in ((DATA, "../shared/data"), (HERE, "benchmarks/finetune"), (Path.home(), "~")):
        command = command.replace(str(folder), shown)
    return command


if __name__ == "__main__":
    main()
