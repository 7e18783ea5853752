"""Relative weight error on a real float32 model: layer 2 of all-MiniLM-L6-v2, rank 32, T = 5.

python benchmarks/weight_error.py
"""

from __future__ import annotations

from itertools import product
from statistics import mean

from common import minilm_layer, save
from loftq import PUBLISHED, QuantSpec, decompose

RANK = 32


def main() -> None:
    weights = minilm_layer()
    rows = []
    for bits, (quantizer, options) in product((2, 3, 4), {"published": PUBLISHED, "default": {}}.items()):
        spec = QuantSpec(bits, **options)
        for method, svd in (
            ("qlora", "auto"),
            ("loftq", "exact"),
            ("loftq", "block"),
            ("loftq-svd-first", "exact"),
            ("qpissa", "exact"),
        ):
            results = {n: decompose(w, spec, rank=RANK, method=method, svd=svd) for n, w in weights.items()}
            row = {
                "bits": bits,
                "quantizer": quantizer,
                "method": method,
                "svd": svd,
                "mean_error": mean(r.error for r in results.values()),
                "bits_per_weight": mean(r.quantized.bits_per_weight for r in results.values()),
                "errors": {n: r.error for n, r in results.items()},
            }
            rows.append(row)
            print(f"{bits} {quantizer:10} {method:16} {svd:6} {row['mean_error']:.4f} {row['bits_per_weight']:.4f}")
    save("weight_error", "python benchmarks/weight_error.py", {"rank": RANK, "num_iter": 5, "rows": rows})


if __name__ == "__main__":
    main()
