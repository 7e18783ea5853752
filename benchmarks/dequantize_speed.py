"""Packed codes to a dense float32 matrix, 4096 x 4096, against bitsandbytes' NF4, side by side.

``fresh`` allocates the result, as bitsandbytes does; ``reused`` writes to memory that exists, as the layers here do.

python benchmarks/dequantize_speed.py
"""

from __future__ import annotations

from functools import partial

import torch

from common import medians, save
from loftq import QuantSpec, kernels
from loftq.codec import quantize

SIZE = 4096


def main() -> None:
    import bitsandbytes.functional as bnb

    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    functions = {}
    out = torch.zeros(SIZE, SIZE)
    for bits in (2, 3, 4, 8):
        quantized = quantize(weight, QuantSpec(bits))
        stored = (quantized.tensors["weight"].flatten(1), quantized.scale(), quantized.tensors["weight_codebook"], None)
        functions[f"loftq {bits} bits, fresh"] = quantized.dequantize
        functions[f"loftq {bits} bits, reused"] = partial(kernels.dequantize, *stored, bits, 64, SIZE, out=out)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    functions["bitsandbytes NF4"] = lambda: bnb.dequantize_4bit(packed, state)
    times = medians(functions, repeats=15)
    for name, seconds in times.items():
        print(f"{name}: {1000 * seconds:.2f} ms")
    ratios = {n: times["bitsandbytes NF4"] / s for n, s in times.items() if n.startswith("loftq")}
    save(
        "dequantize_speed", "python benchmarks/dequantize_speed.py", {"size": SIZE, "seconds": times, "ratios": ratios}
    )


if __name__ == "__main__":
    main()
