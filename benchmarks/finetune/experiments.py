"""What `run.py` runs: models, starts and the settings of each experiment.

| experiment | model | trained on | measured on | bits | seeds |
|---|---|---|---|---|---|
| `rates` | SmolLM2-135M | WikiText-2 valid, 16 steps at several learning rates | end of valid, 8,192 tokens | 2, 4 | 1 |
| `wikitext2` | SmolLM2-135M | WikiText-2 valid, 65,536 tokens | test, first 16,384 tokens | 2, 2.5, 3, 4 | 2; 1 at 2.5 and 3 |
| `wikitext2_gpu` | SmolLM2-135M | WikiText-2 valid, 2 epochs of 273,868 tokens | test, 312,144 tokens | 2, 4 | 5 |
| `gsm8k` | SmolLM2-135M | GSM8K, 512 problems | loss on 256 answers; accuracy on 128 | 2 | 1 |
| `sst2`, `cola` | all-MiniLM-L6-v2 | SST-2, 12,000 rows; CoLA, 5 epochs | GLUE's validation split | 2, 4 | 3 |
| `sst2_gpu`, `cola_gpu` | all-MiniLM-L6-v2 | SST-2, all rows, 3 epochs; CoLA, 20 epochs | GLUE's validation split | 2, 4 | 5 |
| `stories` | stories260K | its `train` ids, until it no longer improves | its `eval` ids | 2, 3, 4 | 3 |

QLoRA and LoftQ have the papers' quantizer (absmax scales; T = 5); loftq-data, the default at 2 bits, and loftq-data-zero, the
default above, have the default one. LoRA takes the modules and
ranks of a quantized folder, and trains an adapter on the original weights. 2.5 bits are the paper's: as many of the first
layers at 4 bits as keep the average at 2.5, the others at 2. On SmolLM2 every method has the learning rate that is its own
best of `rates`, at 2 bits (for 2 and 2.5) or at 4 bits (for 3 and 4), so that none is judged at a rate that suits another; a
refined start has that of loftq-data, and loftq-data-zero, whose adapter begins as small as LoRA's, that of LoRA.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from common import DATA, minilm_dir, smollm2_dir  # noqa: E402 - beside this folder, which is no package

C4 = DATA / "calib" / "c4.utf8"
STATISTICS = "statistics.safetensors"
METHODS = {
    "lora": "LoRA",
    "qlora": "QLoRA",
    "loftq": "LoftQ",
    "loftq-data": "loftq-data",
    "loftq-data-zero": "loftq-data-zero",
    "refined": "loftq-data refined",
}
"""Starting points as tables and pictures call them."""
ALL = [name for name in METHODS if name != "loftq-data-zero"]

Command = tuple[Any, ...]


@dataclass(frozen=True)
class Model:
    """A model and how its starts are made.

    Attributes:
        rank, calibration: options of ``loftq quantize`` and ``loftq calibrate``. first_layers: LAYERS:BITS for 2.5 bits.
        refine: options of ``loftq refine``.
    """

    name: str
    folder: Callable[[], Path]
    rank: int
    calibration: Command
    first_layers: str = ""
    refine: Command = ()

    def commands(self, start: str, made: Path) -> list[str | Command]:
        """What makes a start in the folder ``made``, from other starts that are named before it.

        A start is METHOD-BITS or METHOD-BITS-CODEBOOK.
        """
        out = ("--out", made / start)
        if start == STATISTICS:
            return [("calibrate", self.folder(), *out, *self.calibration)]
        short = start.replace("loftq-data-zero", "zero").replace("loftq-data", "data")
        method, bits, codebook = [*short.split("-"), ""][:3]
        if method == "refined":
            before = f"loftq-data-{bits}"
            return [before, ("refine", made / before, *out, *self.refine)]
        width = ("--bits", 2, "--first-layers-bits", self.first_layers) if bits == "2.5" else ("--bits", bits)
        quantize = ("quantize", self.folder(), *out, *width, "--rank", self.rank)
        if method in ("data", "zero"):
            ours = "loftq-data-zero" if method == "zero" else "loftq-data"
            return [STATISTICS, (*quantize, "--method", ours, "--statistics", made / STATISTICS)]
        published = (
            ("--codebook", codebook, "--scale", "absmax", "--scale-dtype", "float32") if codebook else ("--published",)
        )
        return [(*quantize, "--method", method, *published)]


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        name: its folder. method: of ``loftq train``. start: its quantized folder. labels: its columns in the results.
    """

    name: str
    method: str
    start: str
    seed: int
    labels: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """Runs that differ in their start only.

    Attributes:
        metric: what decides. options: of ``loftq train``. prepare: writes what the options name into the work folder.
        afterwards: a name -> options of ``loftq evaluate`` for metrics that are taken of the result only.
    """

    name: str
    title: str
    model: Model
    metric: str
    runs: Sequence[Run]
    options: Callable[[Path], dict[str, Any]]
    afterwards: dict[str, Command] = field(default_factory=dict)


SMOLLM2 = Model(
    "smollm2",
    smollm2_dir,
    32,
    (
        "--calibration",
        C4,
        "--calibration-samples",
        128,
        "--calibration-length",
        512,
        "--calibration-gradients",
        32,
        "--fisher",
    ),
    first_layers="7:4",
    refine=(
        "--text",
        C4,
        "--stages",
        "model",
        "--epochs",
        1,
        "--samples",
        218,
        "--length",
        512,
        "--max-tokens",
        100000,
    ),
)
MINILM = Model(
    "minilm",
    minilm_dir,
    16,
    ("--calibration", C4, "--calibration-samples", 128, "--calibration-length", 256, "--calibration-gradients", 0),
)
STORIES = Model(
    "stories",
    lambda: DATA / "stories260K",
    8,
    ("--calibration", f"{DATA / 'stories260K' / 'tokens.safetensors'}:train", "--calibration-length", 256),
)


def runs(methods: Sequence[str], seeds: dict[str, int], codebooks: Sequence[str] = ()) -> list[Run]:
    """Every method at every width with so many seeds; full-precision LoRA once, with as many seeds as the most."""
    found = []
    if "lora" in methods:
        start = f"qlora-4-{codebooks[0]}" if codebooks else "qlora-4"
        labels = {"method": "lora", "bits": 16.0}
        found += [Run(f"lora-s{seed}", "lora", start, seed, labels) for seed in range(max(seeds.values()))]
    for bits, count in seeds.items():
        for method in (m for m in methods if m != "lora"):
            for codebook in codebooks if method in ("qlora", "loftq") and codebooks else ("",):
                start = f"{method}-{bits}" + (f"-{codebook}" if codebook else "")
                labels = {"method": method, "bits": float(bits), **({"codebook": codebook} if codebook else {})}
                own = "qlora" if method == "qlora" else "loftq"
                found += [Run(f"{start}-s{seed}", own, start, seed, labels) for seed in range(count)]
    return found


RATES = {"2": (3e-4, 1e-3, 3e-3, 1e-2), "4": (3e-4, 1e-3, 3e-3)}
"""bits -> learning rates that are tried; LoRA's are those of 2 bits."""


def wikitext(folder: Path, train: str, held: str) -> dict[str, Any]:
    """Task and data; the token ids are cut once, so that every run has the same."""
    from safetensors.torch import save_file

    from loftq.evaluate.models import encode, load_tokenizer

    path = folder / "wikitext2.safetensors"
    if not path.exists():
        tokenizer = load_tokenizer(smollm2_dir())
        texts = {
            name: (DATA / "wikitext2" / f"{name}.unk.txt").read_text(encoding="utf-8") for name in ("valid", "test")
        }
        valid, test = (encode(tokenizer, texts[name]) for name in ("valid", "test"))
        cut = {"train": valid[:-8192], "held": valid[-8192:], "test": test[:16384], "all": valid, "whole": test}
        save_file({name: ids.clone() for name, ids in cut.items()}, path)
    return {
        "task": "causal",
        "data": f"{path}:{train}",
        "eval-data": f"{path}:{held}",
        "max-length": 256,
        "dtype": "bfloat16",
    }


def rates() -> Experiment:
    found = {}
    for bits, tried in RATES.items():
        for rate in tried:
            for run in runs(ALL[:-1], {bits: 1}):
                name, labels = f"{run.name}-{rate:g}", {**run.labels, "learning_rate": rate}
                found[name] = Run(name, run.method, run.start, run.seed, labels, {"learning-rate": rate})
    return Experiment(
        "rates",
        "SmolLM2-135M on WikiText-2, learning rates",
        SMOLLM2,
        "perplexity",
        list(found.values()),
        lambda folder: {**wikitext(folder, "train", "held"), "max-steps": 16, "batch-size": 4, "warmup-ratio": 0.1},
    )


def best_rate(method: str, bits: float) -> float:
    """Of `rates.json`: the method's own, at 2 bits for widths below 3 and at 4 bits for the others."""
    method = {"refined": "loftq-data", "loftq-data-zero": "lora"}.get(method, method)
    known = 16 if method == "lora" else 2 if bits < 3 else 4
    rows = json.loads((HERE / "rates.json").read_text(encoding="utf-8"))["rows"]
    mine = [row for row in rows if (row["method"], row["bits"]) == (method, known) and row["status"] == "finished"]
    return min(mine, key=lambda row: row["after"]["perplexity"])["learning_rate"]


def at_best_rate(found: list[Run]) -> list[Run]:
    if not (HERE / "rates.json").exists():
        sys.exit("the learning rates are not known yet; run the experiment `rates` first")
    return [
        Run(
            r.name,
            r.method,
            r.start,
            r.seed,
            r.labels,
            {"learning-rate": best_rate(r.labels["method"], r.labels["bits"])},
        )
        for r in found
    ]


def wikitext2() -> Experiment:
    return Experiment(
        "wikitext2",
        "SmolLM2-135M on WikiText-2",
        SMOLLM2,
        "perplexity",
        at_best_rate(
            runs(ALL, {"2": 2, "3": 1, "4": 2, "2.5": 1}) + runs(["loftq-data-zero"], {"2": 1, "3": 1, "4": 2})
        ),
        lambda folder: {**wikitext(folder, "train", "test"), "max-steps": 64, "batch-size": 4, "warmup-ratio": 0.1},
    )


def wikitext2_gpu() -> Experiment:
    """All of valid, twice, measured on all of test: eight times the tokens of :func:`wikitext2`, for a GPU."""
    found = at_best_rate(runs(ALL, {"2": 5, "4": 5}) + runs(["loftq-data-zero"], {"4": 5}))
    long = {"epochs": 2, "batch-size": 16, "eval-batch-size": 32, "warmup-ratio": 0.1}
    return Experiment(
        "wikitext2_gpu",
        "SmolLM2-135M on WikiText-2, 547,000 tokens",
        SMOLLM2,
        "perplexity",
        found,
        lambda folder: {**wikitext(folder, "all", "whole"), **long},
    )


def gsm8k() -> Experiment:
    data = {"task": "completion", "data": DATA / "gsm8k" / "train.jsonl", "eval-data": DATA / "gsm8k" / "test.jsonl"}
    template = {"prompt-template": "{prompt}\n", "map": "question=prompt,answer=completion", "max-length": 512}
    shared = {"max-steps": 64, "batch-size": 8, "warmup-ratio": 0.1, "schedule": "cosine", "weight-decay": 0.1}
    return Experiment(
        "gsm8k",
        "SmolLM2-135M on GSM8K",
        SMOLLM2,
        "perplexity",
        at_best_rate(runs(ALL, {"2": 1})),
        lambda folder: {**data, **template, **shared, "limit": 512, "eval-limit": 256, "dtype": "bfloat16"},
        afterwards={"accuracy": ("--metrics", "gsm8k", "--limit", 128, "--max-new-tokens", 192, "--batch-size", 32)},
    )


def glue(name: str, title: str, metric: str, options: dict[str, Any], seeds: int = 3) -> Experiment:
    shared = {"task": "classification", "batch-size": 32, "max-length": 128, "metrics": metric, "dtype": "bfloat16"}
    found = runs(["lora", "qlora", "loftq", "loftq-data"], {"2": seeds, "4": seeds}, ("nf", "uniform"))
    found += runs(["loftq-data-zero"], {"4": seeds})
    return Experiment(
        name,
        f"all-MiniLM-L6-v2 on {title}",
        MINILM,
        metric,
        found,
        lambda folder: {**shared, **options},
    )


SST2 = {"data": DATA / "glue_sst2" / "train.tsv", "eval-data": DATA / "glue_sst2" / "test.tsv"}
COLA = {
    "data": DATA / "glue_cola" / "train.tsv",
    "eval-data": DATA / "glue_cola" / "dev.tsv",
    "map": "3=text,1=label",
}


def sst2() -> Experiment:
    return glue("sst2", "SST-2", "accuracy", {**SST2, "limit": 12000, "epochs": 1, "learning-rate": 1e-3})


def sst2_gpu() -> Experiment:
    """All rows three times: fifteen times the steps of :func:`sst2`."""
    return glue("sst2_gpu", "SST-2, all rows, 3 epochs", "accuracy", {**SST2, "epochs": 3, "learning-rate": 3e-4}, 5)


def cola() -> Experiment:
    return glue("cola", "CoLA", "matthews", {**COLA, "epochs": 5, "learning-rate": 3e-4})


def cola_gpu() -> Experiment:
    return glue("cola_gpu", "CoLA, 20 epochs", "matthews", {**COLA, "epochs": 20, "learning-rate": 1e-4}, 5)


def stories() -> Experiment:
    ids = DATA / "stories260K" / "tokens.safetensors"
    shared = {"task": "causal", "data": f"{ids}:train", "eval-data": f"{ids}:eval", "max-length": 256, "batch-size": 8}
    return Experiment(
        "stories",
        "stories260K on its own stories",
        STORIES,
        "perplexity",
        runs(ALL[:-1], {"2": 3, "3": 3, "4": 3}) + runs(["loftq-data-zero"], {"2": 3, "3": 3, "4": 3}),
        lambda folder: {**shared, "epochs": 40, "eval-steps": 34, "patience": 4, "learning-rate": 3e-3},
    )


EXPERIMENTS = {f.__name__: f for f in (rates, wikitext2, wikitext2_gpu, gsm8k, sst2, sst2_gpu, cola, cola_gpu, stories)}
