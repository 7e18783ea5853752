"""Quantizing a checkpoint of Llama-2-7B's shape: time, memory and bytes on disk, at 2 and 4 bits, r = 64, T = 5.

python benchmarks/large.py                     # 8 of the 32 layers
python benchmarks/large.py --layers 32         # all: 13.5 GB for the source, and up to 4.8 GB beside it
python benchmarks/large.py --sweep             # cost per weight against width and depth, and large-cost.png

The weights are random, see llama_shaped.py; what they are changes nothing about time and memory. Each width is one run of
`loftq quantize` in a process of its own, weight-only. Made files are removed afterwards, unless --keep. With fewer layers the
time for 32 is projected: 32 times the measured time of a layer, and what lies outside the layers (start, hashing and reading
the source, embeddings) in proportion to the source's bytes, which is too much rather than too little.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

import loftq
from common import HERE, save
from llama_shaped import Shape, write_checkpoint
from loftq.bench.bounds import judge
from loftq.bench.case import BYTES, Case
from loftq.bench.model import baseline_memory
from loftq.bench.units import amount
from loftq.command import run_loftq
from loftq.report.memory import predict_footprint
from loftq.report.progress import bar
from loftq.report.tables import size

WHOLE = Shape()
BITS = (2, 4)
PICTURE = HERE / "large-cost.png"
# Cost against width: two layers; against depth: one width. Vocabularies are small, for they are not quantized.
WIDTHS, WIDTHS_LAYERS = (512, 1024, 2048, 4096), 2
DEPTHS, DEPTHS_WIDTH = (2, 4, 6, 8), 1024
SWEEP_VOCABULARY = 1024


def proportioned(layers: int, width: int, vocabulary: int) -> Shape:
    """A shape with Llama-2-7B's ratio of the feed-forward's width to the model's, in multiples of 64."""
    return Shape(layers, width, max(64, round(width * WHOLE.intermediate / WHOLE.width / 64) * 64), vocabulary)


@contextmanager
def checkpoint(shape: Shape, folder: Path | None, keep: bool, settings: Sequence[loftq.LoftQConfig]) -> Iterator[Path]:
    """A folder with the checkpoint ``source``, after a look at the free disk; removed at the end."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="loftq-large-", dir=folder))
    try:
        needed, free = needed_bytes(shape, settings), shutil.disk_usage(work).free
        if needed > free:
            raise SystemExit(
                f"{work} has {size(free)} left, but this takes {size(needed)}; free some space, choose another --folder "
                f"or fewer --layers"
            )
        started = time.perf_counter()
        with bar(shape.nbytes // 2, "writing") as advance:
            write_checkpoint(work / "source", shape, advance=advance)
        print(f"{size(shape.nbytes)} written in {time.perf_counter() - started:.0f} s", flush=True)
        yield work / "source"
    finally:
        if keep:
            print(f"kept: {work}")
        else:
            shutil.rmtree(work)


def needed_bytes(shape: Shape, settings: Sequence[loftq.LoftQConfig]) -> int:
    """The source's bytes and those of the largest result."""
    config = LlamaConfig(**shape.config())
    return shape.nbytes + max(predict_footprint(config, s).total_bytes for s in settings)


def measure(shape: Shape, source: Path, bits: int, rank: int, iters: int, keep: bool) -> dict[str, Any]:
    """One run of ``loftq quantize``, and what it took."""
    out = source.with_name(f"quantized-{bits}bit")
    options = ["quantize", str(source), "--out", str(out), "--bits", str(bits), "--rank", str(rank)]
    options += ["--iters", str(iters), "--no-calibration", "--json"]
    started = time.perf_counter()
    report = run_loftq(options)
    wall = time.perf_counter() - started
    timing, totals = report["timing"], report["totals"]
    on_disk = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    if not keep:
        shutil.rmtree(out)
    outside = sum(s for name, s in timing["modules"].items() if not re.search(r"\.layers\.\d+\.", name))
    # from the whole, as small matrices are worked on side by side and their own times overlap
    layer = (timing["seconds"] - outside) / shape.layers
    row = {
        "bits": bits,
        "layers": shape.layers,
        "width": shape.width,
        "intermediate": shape.intermediate,
        "vocabulary": shape.vocabulary,
        "quantized_weights": totals["weights"],
        "seconds": wall,
        "seconds_quantizing": timing["seconds"],
        "seconds_per_layer": layer,
        "seconds_per_million_weights": layer / shape.layer_weights() * 1e6,
        "peak_memory_bytes": timing["peak_memory_bytes"],
        "peak_above_python_and_torch": timing["peak_memory_bytes"] - baseline_memory(),
        "source_bytes": shape.nbytes,
        "bytes_on_disk": on_disk,
        "bits_per_weight": totals["bits_per_weight"],
        "mean_error": totals["mean_error"],
    }
    if (shape.width, shape.intermediate) == (WHOLE.width, WHOLE.intermediate):
        rest = (wall - shape.layers * layer) * WHOLE.nbytes / shape.nbytes
        row["seconds_32_layers"] = wall if shape.layers == WHOLE.layers else WHOLE.layers * layer + rest
        row["measured_32_layers"] = shape.layers == WHOLE.layers
    return row


def told(row: dict[str, Any]) -> str:
    """A row in words."""
    text = (
        f"{row['bits']} bits, {row['layers']} layers of width {row['width']}: {amount(row['seconds'], 's')}, "
        f"{amount(row['seconds_per_layer'], 's')} a layer, {amount(row['seconds_per_million_weights'], 's')} a million "
        f"weights; peak {size(row['peak_memory_bytes'])}, {size(row['peak_above_python_and_torch'])} above Python and torch; "
        f"{size(row['source_bytes'])} -> {size(row['bytes_on_disk'])}"
    )
    if "seconds_32_layers" in row:
        how = "measured" if row["measured_32_layers"] else "projected"
        text += f"; 32 layers {row['seconds_32_layers'] / 60:.1f} min ({how})"
    return text


def cases(row: dict[str, Any]) -> list[Case]:
    """What of a row has a bound."""
    if "seconds_32_layers" not in row:
        return []
    name = f"{row['bits']} bits"
    return [
        Case("large", f"{name}, 32 layers", {"quantize": (row["seconds_32_layers"],)}),
        Case("large", f"{name}, peak memory", {"quantize": (float(row["peak_memory_bytes"]),)}, BYTES),
    ]


def measured(shape: Shape, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each of the bits, printed as it comes."""
    settings = [
        loftq.LoftQConfig(bits=bits, rank=options.rank, num_iter=options.iters, method="loftq", calibration=None)
        for bits in options.bits
    ]
    with checkpoint(shape, options.folder, options.keep, settings) as source:
        for bits in options.bits:
            row = measure(shape, source, bits, options.rank, options.iters, options.keep)
            print(told(row), flush=True)
            yield row


def sweep(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Rows against width, and against depth."""
    shapes = {
        "width": [proportioned(WIDTHS_LAYERS, width, SWEEP_VOCABULARY) for width in options.widths],
        "depth": [proportioned(layers, DEPTHS_WIDTH, SWEEP_VOCABULARY) for layers in options.depths],
    }
    return {of: [row for shape in found for row in measured(shape, options)] for of, found in shapes.items()}


def draw(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Seconds per million weights against width, and against the number of layers; a line for each of the bits."""
    from matplotlib.figure import Figure

    from loftq.report.palette import BITS as COLOURS

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    labels = {
        "width": ("width", f"width, {WIDTHS_LAYERS} layers"),
        "layers": ("depth", f"layers, width {DEPTHS_WIDTH}"),
    }
    for axis, (key, (of, label)) in zip(axes, labels.items(), strict=True):
        for bits in sorted({r["bits"] for r in rows[of]}):
            line = [r for r in rows[of] if r["bits"] == bits]
            xs, ys = [r[key] for r in line], [r["seconds_per_million_weights"] for r in line]
            axis.plot(xs, ys, color=COLOURS[bits], marker="o", label=f"{bits} bits")
        if key == "width":
            axis.set_xscale("log", base=2)
        axis.set_xticks([r[key] for r in rows[of]], [str(r[key]) for r in rows[of]])
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds per million weights")
    axes[0].set_ylim(bottom=0)
    axes[1].legend()
    figure.savefig(path, dpi=120)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=WHOLE.width, help="the feed-forward's follows")
    parser.add_argument("--vocabulary", type=int, default=WHOLE.vocabulary)
    parser.add_argument("--bits", type=numbers, default=list(BITS), help="with commas")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--iters", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where files are made; by default the system's for temporary ones")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint and its quantizations")
    parser.add_argument("--sweep", action="store_true", help="cost against width and depth")
    parser.add_argument("--widths", type=numbers, default=list(WIDTHS), help="of --sweep")
    parser.add_argument("--depths", type=numbers, default=list(DEPTHS), help="of --sweep")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "benchmarks/large.py", *given])
    settings = {"rank": options.rank, "num_iter": options.iters}
    if options.sweep:
        from loftq.report.plots import require_matplotlib

        require_matplotlib()
        rows = sweep(options)
        draw(rows, PICTURE)
        save("large_sweep", command, settings | rows)
        return
    found = list(measured(proportioned(options.layers, options.width, options.vocabulary), options))
    judged = [j for row in found for case in cases(row) for j in judge(case)]
    for one in judged:
        print(f"{one.bound.case}: {one.text}")
    save("large", command, settings | {"rows": found, "bounds": [one.to_dict() for one in judged]})


if __name__ == "__main__":
    main()
