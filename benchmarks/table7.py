"""The LoftQ paper's compression ratios and training memory from configurations alone, beside the published numbers.

python benchmarks/table7.py          # computes, writes results/table7.json and the tables of docs/memory.md
python benchmarks/table7.py --check  # only compares docs/memory.md with results/table7.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common import RESULTS, save
from loftq.checkpoint.source import open_config
from loftq.report.memory import TrainingSetup, predict_training
from loftq.report.memory.paper import BEST, MODELS, TABLE, Published, accountings, footprint
from loftq.report.memory.simulate import simulate_step
from loftq.report.memory.training import build_model

PAGE = Path(__file__).resolve().parent.parent / "docs" / "memory.md"
COPY = RESULTS / "table7.json"
SETUPS = {"fused attention": {}, "eager attention": {"attention": "eager"}, "eager, float32": {"attention": "eager"}}
TRAINING = {"llama-2-7b": 15.0, "llama-2-13b": 24.0}  # GB; GSM8K, batch 1, length 384
CONTEXT = (0.5, 1.0)  # GB that a process takes on a GPU before its first tensor: the usual range, not measured here
SHOWN = 5  # readings of the definition
NAMES = {
    "deberta-v3-base": "DeBERTaV3-base",
    "bart-large": "BART-large",
    "llama-2-7b": "LLAMA-2-7b",
    "llama-2-13b": "LLAMA-2-13b",
}


def ratios(row: Published) -> dict[str, Any]:
    """A row as published, by the paper's accounting, and by the bytes that would be stored here; in percent."""
    compression, trainable = BEST.ratios(row)
    stored = footprint(row)
    return {
        **asdict(row),
        "ours": compression,
        "ours_trainable": trainable,
        "difference": compression - row.compression,
        "difference_trainable": trainable - row.trainable,
        "stored_bits_per_weight": stored.bits_per_weight,
        "stored": 100 * stored.compression_ratio,
        "whole_folder": 100 * stored.stored_ratio,
        "whole_trainable": 100 * stored.trainable_share,
    }


def readings() -> list[dict[str, Any]]:
    """Every accounting with its largest difference from the published ratios, the nearest first."""
    found = [{**asdict(a), "largest_difference": a.largest_difference()} for a in accountings()]
    return sorted(found, key=lambda reading: reading["largest_difference"])


def training() -> list[dict[str, Any]]:
    """Peak of a training step of both LLAMA models with 4-bit NormalFloat as published, rank 64, on a GPU."""
    rows = []
    for model, published in TRAINING.items():
        row = next(r for r in TABLE if r.model == model and r.bits == 4)
        for label, options in SETUPS.items():
            dtype = "float32" if "float32" in label else "bfloat16"
            setup = TrainingSetup("loftq", batch_size=1, length=384, dtype=dtype, **options)
            memory = predict_training(open_config(MODELS / model), row.settings(), setup)
            rows.append({"model": model, "label": label, "published_gb": published, **memory.to_dict()})
    return rows


def as_the_authors() -> list[dict[str, Any]]:
    """What the authors' program of that time (their repository's ``train_gsm8k.py``) holds at the peak, term by term.

    bitsandbytes' NF4 with float32 scales and a dense copy in float16; embedding, head and norms in float16; no autocast, so
    adapters compute in float32 on copies of their inputs, with a dropout of 0.1; attention that keeps its scores
    (transformers 4.31); gradients that stay from one batch to the next (4 batches a step); AdamW.
    """
    rows = []
    for model, published in TRAINING.items():
        row = next(r for r in TABLE if r.model == model and r.bits == 4)
        settings = replace(row.settings(), lora_dropout=0.1)
        config = open_config(MODELS / model)
        # float16 without autocast is what the CPU has; its masks of dropout are left out below
        setup = TrainingSetup("loftq", batch_size=1, length=384, dtype="float16", attention="eager", device="cpu")
        built = build_model(config, settings, setup)
        weights = sum(t.nbytes for t in [*built.parameters(), *built.buffers()])
        gradients = sum(p.nbytes for p in built.parameters() if p.requires_grad)
        dense = 2 * config.hidden_size * config.intermediate_size
        step = simulate_step(built, batch_size=1, length=384, device="cuda")
        plain = simulate_step(build_model(config, row.settings(), setup), batch_size=1, length=384, device="cuda")
        logits = 2 * 4 * 384 * config.vocab_size  # gradients of the logits and of their softmax
        terms = {
            "weights": weights,
            "moments of AdamW": 2 * gradients,
            "gradients": gradients,
            "activations": plain.stored,
            "dropout": step.stored - plain.stored,
            "logits and a dense matrix": logits + dense,
        }
        rows.append({"model": model, "published_gb": published, "terms": terms, "total": sum(terms.values())})
    return rows


def markdown(record: dict[str, Any]) -> str:
    """The tables of the page."""
    lines = [
        "| model | quantizer | bits | rank | published | by the paper's accounting | difference | same, bytes stored here "
        "| whole folder / whole model |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in record["rows"]:
        lines.append(
            f"| {NAMES[r['model']]} | {r['quantizer']} | {r['bits']} | {r['rank']} | {r['compression']} ({r['trainable']}) "
            f"| {r['ours']:.2f} ({r['ours_trainable']:.2f}) | {r['difference']:+.2f} | {r['stored']:.1f} "
            f"| {r['whole_folder']:.1f} |"
        )
    lines += ["", f"The nearest of {len(record['readings'])} readings of the definition:", ""]
    lines += [
        "| counted | bits of a NormalFloat scale | bits of a uniform range | adapters | pretrained | largest difference |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for a in record["readings"][:SHOWN]:
        lines.append(
            f"| {a['scope']} | {a['scale_bits']:g} | {a['uniform_bits']:g} | {a['adapter_bits']} bits "
            f"| {a['pretrained_bits']} bits | {a['largest_difference']:.2f} |"
        )
    whole = next(a for a in record["readings"] if a["scope"] != "matrices")
    lines += [
        "",
        f"The nearest reading that counts the whole model is off by up to {whole['largest_difference']:.1f} points.",
        "",
        "Training memory in GB, 4-bit NormalFloat, rank 64, batch 1, 384 tokens, predicted for a GPU:",
        "",
        "| model | published | " + " | ".join(SETUPS) + " |",
        "|---|---:|" + "---:|" * len(SETUPS),
    ]
    for model, published in TRAINING.items():
        peaks = [m["peak"] / 1e9 for m in record["training"] if m["model"] == model]
        lines.append(f"| {NAMES[model]} | {published:g} | " + " | ".join(f"{p:.1f}" for p in peaks) + " |")
    parts = ("weights", "optimizer", "activations", "transient")
    lines += [
        "",
        "Of these, with fused attention: " + "; ".join(_shares(record, model, parts) for model in TRAINING) + ".",
    ]
    authors = {r["model"]: r for r in record["as_the_authors"]}
    first = next(iter(authors.values()))
    lines += ["", "The authors' program, in GB:", ""]
    lines += ["| term | " + " | ".join(NAMES[m] for m in authors) + " |", "|---|" + "---:|" * len(authors)]
    for term in first["terms"]:
        lines.append(f"| {term} | " + " | ".join(f"{r['terms'][term] / 1e9:.2f}" for r in authors.values()) + " |")
    lines.append("| counted | " + " | ".join(f"{r['total'] / 1e9:.2f}" for r in authors.values()) + " |")
    lines.append("| CUDA context (usual, not measured) | " + " | ".join("0.5 to 1" for _ in authors) + " |")
    rest = [[r["published_gb"] - r["total"] / 1e9 - c for c in reversed(CONTEXT)] for r in authors.values()]
    lines.append("| unexplained | " + " | ".join(f"{low:.1f} to {high:.1f}" for low, high in rest) + " |")
    lines.append("| published | " + " | ".join(f"{r['published_gb']:g}" for r in authors.values()) + " |")
    return "\n".join(lines)


def _shares(record: dict[str, Any], model: str, parts: tuple[str, ...]) -> str:
    memory = next(m for m in record["training"] if m["model"] == model)
    return f"{NAMES[model]} " + ", ".join(f"{part} {memory[part] / 1e9:.1f}" for part in parts)


def main(arguments: list[str]) -> int:
    begin, end = "<!-- table 7 -->", "<!-- end of table 7 -->"
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    shown, _, after = rest.partition(end)
    if "--check" in arguments:
        return int(shown.strip() != markdown(json.loads(COPY.read_text(encoding="utf-8"))))
    record = {"rows": [ratios(row) for row in TABLE], "readings": readings(), "training": training()}
    record["as_the_authors"] = as_the_authors()
    save("table7", "python benchmarks/table7.py", record)
    text = markdown(record)
    print(text)
    PAGE.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
