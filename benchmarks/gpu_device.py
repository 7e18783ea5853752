"""What ``gpu.py`` measures with: the device and its clock, recorded graphs, and the linear layers of each library."""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loftq import PUBLISHED, QuantLinear, QuantSpec

HIDDEN, INNER = 4096, 11008  # Llama-2-7B


class Device(NamedTuple):
    """Where to measure, how often, and how large."""

    type: str
    repeats: int
    quick: bool

    @property
    def on_gpu(self) -> bool:
        return self.type != "cpu"

    @property
    def shapes(self) -> list[tuple[int, int]]:
        hidden, inner = (HIDDEN, INNER) if self.on_gpu else (64, 128)
        return [(hidden, hidden), (inner, hidden), (hidden, inner)]

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def random(self, *shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
        generator = torch.Generator(self.type).manual_seed(seed)
        return (scale * torch.randn(*shape, generator=generator, device=self.type)).bfloat16()

    def seconds(self, run: Callable[[], Any]) -> float:
        """Median of ``repeats`` runs after one to warm up, by the device's own clock."""
        run()
        times = []
        for _ in range(self.repeats):
            self.synchronize()
            if self.on_gpu:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                run()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / 1000)
            else:
                started = time.perf_counter()
                run()
                times.append(time.perf_counter() - started)
        return statistics.median(times)


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# --- linear layers without bias, from a dense (out, in) bfloat16 weight


def dense_layer(weight: Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def loftq_layer(bits: int, weight: Tensor) -> nn.Module:
    return QuantLinear.from_linear(dense_layer(weight), QuantSpec(bits, **{**PUBLISHED, "scale_dtype": "float16"}))


def bitsandbytes_layer(weight: Tensor) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
    )
    layer.weight = bnb.nn.Params4bit(
        weight.cpu(), requires_grad=False, blocksize=64, quant_type="nf4", compress_statistics=False, module=layer
    )
    return layer.to(weight.device)


def torchao_layer(weight: Tensor) -> nn.Module:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    layer = dense_layer(weight.clone())
    # the layout of torch's own int4 product; the default one needs another package
    quantize_(layer, Int4WeightOnlyConfig(group_size=64, int4_packing_format="tile_packed_to_4d"))
    return layer


@functools.cache
def layers(training: bool = False) -> dict[str, Callable[[Tensor], nn.Module]]:
    found: dict[str, Callable[[Tensor], nn.Module]] = {"dense bfloat16": dense_layer}
    found |= {f"loftq {bits} bits": functools.partial(loftq_layer, bits) for bits in (2, 3, 4)}
    others = {"bitsandbytes NF4": ("bitsandbytes", bitsandbytes_layer), "torchao int4": ("torchao", torchao_layer)}
    for name, (package, build) in others.items():
        if installed(package) is None:
            print(f"{name}: left out, {package} is not installed")
        elif not (training and package == "torchao"):  # its layers are for inference
            found[name] = build
    return found


def difference(found: Any, expected: Any) -> float:
    """Largest ‖found - expected‖ / ‖expected‖ of tensors that belong together; not a number where one is not."""
    pairs = zip(found, expected, strict=True) if isinstance(found, (tuple, list)) else [(found, expected)]
    norms = [
        (torch.linalg.vector_norm(a.double() - b.double()), torch.linalg.vector_norm(b.double())) for a, b in pairs
    ]
    return max(float(apart / size) if size else float(apart) for apart, size in norms)


def stored_bytes(layer: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers()))


def graph_of(device: Device, run: Callable[[], Any]) -> Callable[[], Any] | None:
    """The same work without Python, or ``None`` where a library cannot be recorded."""
    if not device.on_gpu:
        return None
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay
    except Exception as error:
        print(f"  not recorded as a graph ({str(error).splitlines()[0][:100]})")
        torch.cuda.synchronize()
        return None


def attempted(name: str, measure: Callable[[], Any]) -> Any:
    """What a measurement gives, or ``None`` and a line where a library fails: the others are measured all the same."""
    try:
        return measure()
    except Exception as error:
        if name.startswith(("loftq", "dense")):
            raise
        print(f"{name}: left out, it fails with: {str(error).splitlines()[0][:160]}")
        return None
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def timed(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
