"""What ``gpu.py`` measures of single kernels: each beside its definition in plain torch, on the same device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_device import Device, attempted, difference
from loftq import QuantSpec, kernels
from loftq.codec import quantize
from loftq.codec.codebook import thresholds

BLOCK = 64


def work(weight: Tensor, bits: int) -> dict[str, Callable[[], Any]]:
    """What touches every weight when a matrix is quantized or used; ``weight`` (rows, n) float32."""
    spec = QuantSpec(bits, block_size=BLOCK)
    n = weight.shape[1]
    tensors = quantize(weight, spec).tensors
    packed, scale, levels = tensors["weight"].flatten(1), tensors["weight_scale"], tensors["weight_codebook"].float()
    borders = thresholds(levels)
    codes = kernels.unpack(packed, bits, n)
    factors = torch.linspace(0.5, 1.1, 16, device=weight.device)
    inverse = torch.triu(torch.full((n, n), 1e-3, device=weight.device), 1) + torch.eye(n, device=weight.device)
    order = torch.arange(n, device=weight.device)
    rounded = (torch.empty_like(codes), torch.empty_like(weight))
    stored = (scale.float(), None, levels, borders, BLOCK)
    return {
        "dequantize to bfloat16": partial(
            kernels.dequantize, packed, scale, levels, None, bits, BLOCK, n, torch.bfloat16
        ),
        "pack": partial(kernels.pack, codes, bits),
        "unpack": partial(kernels.unpack, packed, bits, n),
        "scale search": partial(kernels.search_scale, weight, levels, borders, factors, 1, BLOCK),
        "encode": partial(kernels.encode, weight, *stored),
        "error feedback, 64 columns": lambda: kernels.feedback(
            weight.clone(), inverse, order, *stored, (0, BLOCK), *rounded
        ),
    }


def single_kernels(device: Device) -> list[dict]:
    shape = device.shapes[0]
    weight = device.random(*shape).float()
    found = []
    for bits in (2, 3, 4):
        for name, run in work(weight, bits).items():
            seconds = device.seconds(run)

            def reference(run: Callable[[], Any] = run) -> tuple[float, float]:
                ours = run()
                with kernels._only("reference"):
                    return device.seconds(run), difference(ours, run())

            plain = attempted("plain torch", reference)  # a large matrix may not fit it
            row = {"bits": bits, "work": name, "shape": shape, "seconds": seconds}
            found.append(row | (dict(zip(("reference_seconds", "difference"), plain, strict=True)) if plain else {}))
            beside = f", plain torch {1e3 * plain[0]:.3f}, apart {plain[1]:.1e}" if plain else ""
            print(f"{shape[0]}x{shape[1]}, {bits} bits, {name}: {1e3 * seconds:.3f} ms{beside}", flush=True)
    return found
