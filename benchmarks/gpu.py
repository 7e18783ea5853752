"""Everything about a GPU in one call: products, kernels, a training step, and quantizing Llama-2-7B's matrices.

python benchmarks/gpu.py            # two minutes; writes results/gpu.json
python benchmarks/gpu.py --quick    # fewer repeats and shapes
python benchmarks/gpu.py --device cpu --quick    # does the script work? tiny shapes, no results written

Products: each of 1, 16, 512 and 4,096 tokens against bitsandbytes' NF4, torchao's int4 and dense bfloat16. As many copies of
a weight as overflow the L2 cache several times are multiplied in turn, so that none is found there, from one CUDA graph, so
that the time of launching from Python does not count; ``eager`` is the time with it. Training: a forward and backward pass
of one decoder layer with LoRA on all seven linear layers, time and peak memory. Quantizing: T = 5, r = 64, block power
iteration against the full SVD on the same device. Single kernels: each beside plain torch, see gpu_kernels.py.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from common import save
from gpu_device import Device, attempted, difference, graph_of, installed, layers, stored_bytes, timed
from gpu_kernels import single_kernels
from loftq import PUBLISHED, QuantSpec, decompose

LAYERS, RANK = 32, 64  # of Llama-2-7B, and of the adapter
TOKENS = (1, 16, 512, 4096)
MOST_SECONDS = 120.0  # within which all 224 matrices are to be quantized


# --- products


def time_products(
    device: Device, name: str, build: Callable[[Tensor], nn.Module], shape: tuple[int, int]
) -> list[dict]:
    """Seconds of one product with each number of tokens."""
    first = build(device.random(*shape, scale=0.02))
    cache = torch.cuda.get_device_properties(0).L2_cache_size if device.on_gpu else 0
    copies = max(2, min(64, -(-4 * cache // max(1, stored_bytes(first)))))
    held = [first, *(build(device.random(*shape, scale=0.02, seed=i)) for i in range(1, copies))]
    rows = []
    for tokens in TOKENS if device.on_gpu else (1, 16):
        x = device.random(tokens, shape[1])

        def run(x: Tensor = x) -> None:
            for layer in held:
                layer(x)

        with torch.inference_mode():
            eager = device.seconds(run) / copies
            replay = graph_of(device, run)
            seconds = eager if replay is None else device.seconds(replay) / copies
            apart = (
                difference(first(x), x.double() @ first.dequantize().double().T)
                if hasattr(first, "dequantize")
                else None
            )
        row = {"shape": shape, "tokens": tokens, "name": name, "seconds": seconds, "eager_seconds": eager}
        row |= {} if apart is None else {"difference": apart}
        rows.append({**row, "copies": copies, "graph": replay is not None, "bytes": stored_bytes(first)})
    return rows


def products(device: Device) -> list[dict]:
    rows = []
    for shape in device.shapes[: 2 if device.quick else 3]:
        for name, build in layers().items():
            rows += attempted(name, lambda n=name, b=build, s=shape: time_products(device, n, b, s)) or []
        for tokens in TOKENS:
            here = {r["name"]: r for r in rows if r["shape"] == shape and r["tokens"] == tokens}
            line = ", ".join(f"{n} {1e6 * r['seconds']:.1f}" for n, r in here.items())
            if line:
                print(f"{shape[0]}x{shape[1]}, {tokens} tokens, microseconds: {line}", flush=True)
    return rows


# --- a training step


class WithLora(nn.Module):
    """y = base(x) + (x Aᵀ) Bᵀ, the same for every base."""

    def __init__(self, base: nn.Module, shape: tuple[int, int], device: Device) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(device.random(RANK, shape[1], scale=shape[1] ** -0.5))
        self.lora_B = nn.Parameter(device.random(shape[0], RANK, scale=0.01))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.lora_A.T) @ self.lora_B.T


def decoder_layer(device: Device, build: Callable[[Tensor], nn.Module]) -> nn.Module:
    """One layer of Llama-2-7B, its seven linear layers replaced."""
    from transformers import LlamaConfig, LlamaModel

    hidden, inner = device.shapes[1][1], device.shapes[1][0]
    heads = 32 if device.on_gpu else 4
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads, num_hidden_layers=1, vocab_size=32
    )
    model = LlamaModel(config).to(device.type, torch.bfloat16)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            weight = module.weight.data
            setattr(
                model.get_submodule(parent), leaf, WithLora(build(weight), (weight.shape[0], weight.shape[1]), device)
            )
    return model


def time_training(device: Device, name: str, build: Callable[[Tensor], nn.Module]) -> list[dict]:
    model = decoder_layer(device, build)
    gc.collect()
    rows = []
    for batch, length in ((1, 512), (4, 1024)) if device.on_gpu else ((1, 16),):
        x = device.random(batch, length, model.config.hidden_size).requires_grad_()

        def step(x: Tensor = x) -> None:
            model(inputs_embeds=x, use_cache=False).last_hidden_state.float().square().mean().backward()
            x.grad = None
            for parameter in model.parameters():
                parameter.grad = None

        seconds = device.seconds(step)
        if device.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            step()
            memory = {"bytes_held": held, "bytes_peak": torch.cuda.max_memory_allocated()}
        else:
            memory = {}
        rows.append({"name": name, "batch": batch, "length": length, "seconds": seconds, **memory})
        peak = f", peak {memory['bytes_peak'] / 2**20:.0f} MiB" if memory else ""
        print(f"training step of a layer, {batch} x {length} tokens, {name}: {1000 * seconds:.2f} ms{peak}", flush=True)
    return rows


def training(device: Device) -> list[dict]:
    found = layers(training=True).items()
    return [row for n, b in found for row in attempted(n, lambda n=n, b=b: time_training(device, n, b)) or []]


# --- quantizing


def block_matrices(device: Device, layer: int = 0) -> Iterator[Tensor]:
    square, up, down = device.shapes
    for i, shape in enumerate([square] * 4 + [up] * 2 + [down]):
        yield device.random(*shape, scale=0.02, seed=100 * layer + i)


def quantizing(device: Device) -> list[dict]:
    rank = RANK if device.on_gpu else 8
    rows = []
    settings = {f"default, {bits} bits": QuantSpec(bits) for bits in ((4,) if device.quick else (4, 3, 2))}
    settings["published, 4 bits"] = QuantSpec(4, **PUBLISHED)
    for name, spec in settings.items():

        def block(spec: QuantSpec = spec, layer: int = 0) -> None:
            for weight in block_matrices(device, layer):
                decompose(weight, spec, rank=rank, num_iter=5)
            device.synchronize()

        block()  # compiles, tunes and warms up
        seconds = timed(block)
        row = {"name": name, "seconds_per_layer": seconds, "seconds_all": LAYERS * seconds, "measured": "one layer"}
        if device.on_gpu and name == "default, 4 bits" and LAYERS * seconds < MOST_SECONDS / 2:
            row["seconds_all"] = timed(lambda b=block: [b(layer=layer) for layer in range(LAYERS)])
            row["measured"] = "all 224 matrices"
        rows.append(row)
        print(f"quantizing, {name}: {row['seconds_all']:.1f} s for 224 matrices ({row['measured']})", flush=True)
    spec = settings["published, 4 bits"]
    full = 0.0
    for shape, count in zip(device.shapes, (4, 2, 1), strict=True):  # one of each shape and one step stand for all
        weight = device.random(*shape, scale=0.02)

        def one_step(weight: Tensor = weight, spec: QuantSpec = spec) -> None:
            decompose(weight, spec, rank=rank, num_iter=1, svd="exact")
            device.synchronize()

        full += 5 * count * timed(one_step)
    name, measured = "published, 4 bits, full SVD", "three matrices, T = 1, times five"
    rows.append({"name": name, "seconds_per_layer": full, "seconds_all": LAYERS * full, "measured": measured})
    print(f"quantizing, {name}: {LAYERS * full:.0f} s for 224 matrices ({measured})", flush=True)
    return rows


# --- what is to be reached


def bounds(product_rows: list[dict], training_rows: list[dict], quantizing_rows: list[dict]) -> list[dict]:
    """Each bound with the measured ratio; a ratio of 1 or more meets it."""
    found = []

    def add(what: str, ratio: float | None) -> None:
        found.append({"bound": what, "ratio": ratio, "met": None if ratio is None else ratio >= 1})

    one = {(tuple(r["shape"]), r["name"]): r["seconds"] for r in product_rows if r["tokens"] == 1}
    for shape in dict.fromkeys(shape for shape, _ in one):
        for bits in (2, 3, 4):
            ours = one[shape, f"loftq {bits} bits"]
            other = one.get((shape, "bitsandbytes NF4"))
            where = f"one token, {shape[0]}x{shape[1]}, {bits} bits"
            add(f"{where}: as fast as bitsandbytes' NF4", None if other is None else other / ours)
            add(f"{where}: twice as fast as dense bfloat16", one[shape, "dense bfloat16"] / ours / 2)
    steps = {(r["name"], r["batch"], r["length"]): r["seconds"] for r in training_rows}
    for name, batch, length in [key for key in steps if key[0] == "loftq 4 bits"]:
        other = steps.get(("bitsandbytes NF4", batch, length))
        ratio = None if other is None else other / steps[name, batch, length]
        add(f"training step, {batch} x {length} tokens, 4 bits: as fast as bitsandbytes", ratio)
    for row in quantizing_rows:
        if "full SVD" not in row["name"]:
            add(f"224 matrices, {row['name']}: within two minutes", MOST_SECONDS / row["seconds_all"])
    for row in found:
        verdict = {None: "not compared", True: "met", False: "MISSED"}[row["met"]]
        print(f"{verdict:>12}  {'' if row['ratio'] is None else format(row['ratio'], '.2f'):>6}  {row['bound']}")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes and settings")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny shapes, to try the script")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu.py measures a CUDA or ROCm device and torch sees none here; nothing was measured.")
        return 0
    device = Device(options.device, 7 if options.quick else 15, options.quick)
    if not device.on_gpu:
        print("tiny shapes on the CPU, to try the script: the numbers mean nothing")
    if device.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        print(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, torch {torch.__version__}")
    parts = {"training": training, "products": products, "quantizing": quantizing, "kernels": single_kernels}
    results: dict[str, list[dict]] = {name: [] for name in parts}
    for name, measure in parts.items():
        results[name] = measure(device)
        if device.on_gpu:  # after each part, so that a run cut short leaves what it has
            record(properties, options.quick, results, [])
    reached = bounds(results["products"], results["training"], results["quantizing"])
    if device.on_gpu:
        record(properties, options.quick, results, reached)
    return 0


def record(properties: Any, quick: bool, results: dict[str, list[dict]], reached: list[dict]) -> None:
    names = ("triton", "bitsandbytes", "torchao")
    device = {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "processors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        **{name: installed(name) for name in names},
    }
    command = "python benchmarks/gpu.py" + (" --quick" if quick else "")
    save("gpu", command, {"device": device, **results, "bounds": reached})


if __name__ == "__main__":
    sys.exit(main())
