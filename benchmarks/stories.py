"""Perplexity before fine-tuning of stories260K, a real 260,032-parameter Llama, at 2, 3 and 4 bits, rank 8.

    python benchmarks/stories.py

Reads the model and its token ids from ``../shared/data/stories260K`` beside the repository.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from safetensors.torch import load_file

from common import DATA, save
from loftq import PUBLISHED, LoftQConfig, quantize_checkpoint
from loftq.evaluate.models import load_for_inference
from loftq.evaluate.perplexity import perplexity

RANK, WINDOW = 8, 256
METHODS = {
    "QLoRA": {"method": "qlora", **PUBLISHED},
    "LoftQ as published, T=5": {"svd": "exact", **PUBLISHED},
    "loftq default": {},
    "qpissa": {"method": "qpissa"},
}


def main() -> None:
    source = DATA / "stories260K"
    if not source.is_dir():
        print(f"skipped: {source} is not here")
        return
    ids = load_file(source / "tokens.safetensors")["eval"].long()

    def evaluate(folder: Path) -> dict[str, float]:
        result = perplexity(load_for_inference(folder), ids, window=WINDOW, batch_size=8)
        return {"perplexity": result.perplexity, "perplexity_se": result.standard_error}

    rows = [{"method": "float32", "bits": 32, **evaluate(source)}]
    print(f"float32: {rows[0]['perplexity']:.3f}")
    with tempfile.TemporaryDirectory() as folder:
        for bits in (2, 3, 4):
            for k, (name, options) in enumerate(METHODS.items()):
                out = Path(folder) / f"{bits}-{k}"
                config = LoftQConfig(bits=bits, rank=RANK, **options)
                report = quantize_checkpoint(source, out, config, progress=False)
                row = {
                    "method": name,
                    "bits": bits,
                    "bits_per_weight": report.bits_per_weight,
                    "weight_error": report.mean_error,
                    **evaluate(out),
                }
                rows.append(row)
                print(
                    f"{bits} bits, {name}: {row['perplexity']:.2f} ± {row['perplexity_se']:.2f}, "
                    f"error {row['weight_error']:.3f}, {row['bits_per_weight']:.3f} bits per weight"
                )
    save(
        "stories",
        "python benchmarks/stories.py",
        {"rank": RANK, "window": WINDOW, "tokens": ids.numel() - 1, "rows": rows},
    )


if __name__ == "__main__":
    main()
