"""The whole decomposition with block power iteration against the same with LAPACK's SVD, side by side.

python benchmarks/solver_speed.py
"""

from __future__ import annotations

import torch

from common import medians, save
from loftq import PUBLISHED, QuantSpec, decompose

SIZE, RANK = 2048, 64


def main() -> None:
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    residual = weight - decompose(weight, QuantSpec(2), rank=RANK, num_iter=0).quantized.dequantize()
    svd = medians({"lapack": lambda: torch.linalg.svd(residual, full_matrices=False)}, repeats=3)["lapack"]
    print(f"one LAPACK SVD of {SIZE}x{SIZE} float32: {svd:.2f} s")
    rows = []
    for bits, (name, options) in ((b, q) for b in (2, 4) for q in {"default": {}, "published": PUBLISHED}.items()):
        spec = QuantSpec(bits, **options)
        errors = {}

        def run(svd: str, spec: QuantSpec = spec, errors: dict[str, float] = errors) -> None:
            errors[svd] = decompose(weight, spec, rank=RANK, svd=svd).error

        times = medians({"block": lambda: run("block"), "exact": lambda: run("exact")}, repeats=3)
        quantizing = medians({"q": lambda: decompose(weight, spec, rank=RANK, num_iter=0)}, repeats=3)["q"]  # noqa: B023
        row = {
            "bits": bits,
            "quantizer": name,
            "seconds": times,
            "seconds_one_quantization": quantizing,
            "ratio": times["exact"] / times["block"],
            "errors": errors,
            "excess_error": errors["block"] / errors["exact"] - 1,
        }
        rows.append(row)
        print(
            f"{bits} bits {name}: block {times['block']:.3f} s, exact {times['exact']:.2f} s, {row['ratio']:.1f} x, "
            f"error +{100 * row['excess_error']:.2f} %, one quantization {quantizing:.3f} s"
        )
    save(
        "solver_speed",
        "python benchmarks/solver_speed.py",
        {"size": SIZE, "rank": RANK, "num_iter": 5, "seconds_lapack_svd": svd, "rows": rows},
    )


if __name__ == "__main__":
    main()
