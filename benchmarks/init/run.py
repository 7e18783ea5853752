"""Every method before any fine-tuning, at 2, 2.5, 3 and 4 bits: errors, perplexity and KL against the original model.

    python benchmarks/init/run.py                       # the three models, every method: hours on two cores
    python benchmarks/init/run.py smollm2 --methods loftq,cloq --bits 2
    python benchmarks/init/run.py --plots-only          # pictures again, from the results

Blocks of 64, all linear layers. Gradients are taken on 32 of the windows. An interrupted run continues when the same
command is run again.

| model | rank | calibration | measured on |
|---|---|---|---|
| smollm2 (SmolLM2-135M-Instruct) | 32 | C4, 128 × 512 tokens | WikiText-2 raw test, first 16,384 tokens, windows of 1,024 |
| stories (stories260K) | 8 | its `train` ids, 128 × 256 | its `eval` ids, windows of 256 |
| minilm (all-MiniLM-L6-v2) | 32 | C4, 128 × 256 tokens | weight and output error only, since it predicts no next token |
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import DATA, minilm_dir, smollm2_dir  # noqa: E402 - beside this folder, which is no package
from loftq.compare import Comparison, compare  # noqa: E402
from loftq.config import METHODS  # noqa: E402
from loftq.report.plots import plot_comparison  # noqa: E402
from loftq.report.system import machine, versions  # noqa: E402

WORK = HERE / "work"  # quantized folders come and go here; not kept in the repository
C4 = DATA / "calib" / "c4.utf8"


@dataclass(frozen=True)
class Benchmark:
    """A model and how it is measured."""

    title: str
    folder: Callable[[], Path]
    options: dict[str, Any]


BENCHMARKS = {
    "smollm2": Benchmark(
        "SmolLM2-135M-Instruct, rank 32",
        smollm2_dir,
        {
            "rank": 32,
            "calibration": str(C4),
            "calibration_samples": 128,
            "calibration_length": 512,
            "text": str(DATA / "wikitext2" / "wiki.test.raw"),
            "max_tokens": 16384,
            "window": 1024,
        },
    ),
    "stories": Benchmark(
        "stories260K, rank 8",
        lambda: DATA / "stories260K",
        {
            "rank": 8,
            "calibration": f"{DATA / 'stories260K' / 'tokens.safetensors'}:train",
            "calibration_samples": 128,
            "calibration_length": 256,
            "text": f"{DATA / 'stories260K' / 'tokens.safetensors'}:eval",
            "max_tokens": None,
            "window": 256,
        },
    ),
    "minilm": Benchmark(
        "all-MiniLM-L6-v2, rank 32",
        minilm_dir,
        {"rank": 32, "calibration": str(C4), "calibration_samples": 128, "calibration_length": 256},
    ),
}

COMPARED = ("float", "qlora", "loftq", "gptq", "qera", "lq-lora", "loftq-data")
"""Methods in the pictures: the two papers', rounding with error feedback, and of those with adapters fitted to the outputs a
closed form and an alternation. The tables have all."""
PICTURES = {
    "smollm2": {"perplexity": COMPARED, "output_error": COMPARED, "quantizer": ("qlora", "rtn", "gptq")},
    "stories": {"perplexity": COMPARED},
}
"""Those that are worth keeping. KL divergence orders the methods as perplexity does."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--methods", default=",".join(METHODS), help="with commas; all by default")
    parser.add_argument("--bits", default="2,2.5,3,4", help="with commas")
    parser.add_argument("--plan", action="append", default=[], metavar="BITS=FILE", help="for loftq-data and auto")
    parser.add_argument("--refine-tokens", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="of the results, instead of the model's")
    parser.add_argument("--plots-only", action="store_true")
    chosen = parser.parse_args(arguments)
    unknown = [name for name in chosen.models if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no model {unknown[0]}; expected {', '.join(BENCHMARKS)}")
    if chosen.name and len(chosen.models) != 1:
        parser.error("--name is for one model")
    command = shlex.join(["python", "benchmarks/init/run.py", *(sys.argv[1:] if arguments is None else arguments)])
    for model in chosen.models or BENCHMARKS:
        name = chosen.name or model
        if not chosen.plots_only:
            run(model, name, chosen, command)
        for picture in plot(name):
            print(f"-> {picture}")


def plot(name: str) -> list[Path]:
    """The pictures of ``NAME.json`` that are worth keeping."""
    path = HERE / f"{name}.json"
    if name not in PICTURES or not path.exists():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    kept = []
    for picture, methods in PICTURES[name].items():
        rows = [row for row in record["rows"] if row["method"] in methods]
        kept += plot_comparison(rows, HERE / "plots" / name, title=record["model"], only=(picture,))
    return kept


def run(model: str, name: str, chosen: argparse.Namespace, command: str) -> None:
    """Measure what is missing, and write ``NAME.json`` after each cell."""
    benchmark = BENCHMARKS[model]
    if not DATA.is_dir():
        print(f"skipped: {DATA} is not here")
        return
    settings = Comparison(
        model=str(benchmark.folder()),
        methods=tuple(chosen.methods.split(",")),
        bits=tuple(float(bits) for bits in chosen.bits.split(",")),
        seed=chosen.seed,
        refine_tokens=chosen.refine_tokens,
        plans={float(bits): Path(file) for bits, _, file in (plan.partition("=") for plan in chosen.plan)},
        **benchmark.options,
    )
    print(f"== {benchmark.title}", flush=True)
    started = time.perf_counter()
    rows = []
    for cell, fresh in compare(settings, WORK / name, command=command):
        rows.append(cell.to_dict())
        took = time.perf_counter() - started
        started = time.perf_counter()
        numbers = {"weight": cell.weight_error, "output": cell.output_error, "ppl": cell.perplexity, "KL": cell.kl}
        shown = cell.error or ", ".join(f"{what} {value:.4g}" for what, value in numbers.items() if value is not None)
        print(f"{cell.method}, {cell.bits:g} bits: {shown} ({f'{took:.0f} s' if fresh else 'known'})", flush=True)
        save(name, command, benchmark, settings, rows)


def save(name: str, command: str, benchmark: Benchmark, settings: Comparison, rows: list[dict[str, Any]]) -> None:
    """Write the rows with the settings, machine and versions that gave them; paths relative to the data."""
    options = {k: str(v).replace(f"{DATA}/", "") if isinstance(v, str) else v for k, v in benchmark.options.items()}
    record = {
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "model": benchmark.title,
        "settings": {**options, "block_size": settings.block_size, "seed": settings.seed},
        "rows": rows,
    }
    path = HERE / f"{name}.json"
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    main()
