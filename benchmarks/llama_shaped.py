"""A checkpoint of Llama's shape with random weights that have heavy tails, written tensor by tensor.

    W = 0.02 / sqrt(2) · diag(o) T diag(i),   T Student-t with 4 degrees of freedom, log o and log i normal

Trained matrices have outliers within channels and channels of unlike size; a normal matrix has neither. Every tensor has a
seed of its own, so any of them can be made alone, whatever the number of layers.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loftq.checkpoint.source import INDEX, SINGLE, as_bytes
from loftq.checkpoint.writer import header_bytes
from loftq.codec.qtensor import TensorInfo

DTYPE = torch.bfloat16
STD = 0.02
CHANNEL_SPREAD = 0.3  # standard deviation of the logarithms of the channels' scales
CHUNK = 1 << 22  # elements made at a time, which the random numbers depend on
SHARD_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama; by default Llama-2-7B's."""

    layers: int = 32
    width: int = 4096
    intermediate: int = 11008
    vocabulary: int = 32000

    def config(self) -> dict[str, Any]:
        """``config.json``: Llama-2-7B's with these sizes and heads of 128, or of half the width where that is less."""
        text = files("loftq.recipes").joinpath("models/llama-2-7b/config.json").read_text(encoding="utf-8")
        heads = max(2, self.width // 128)
        return json.loads(text) | {
            "dtype": str(DTYPE).removeprefix("torch."),
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
        }

    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor in the order of the model."""
        width, wide = self.width, self.intermediate
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, width)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            shapes |= {f"{prefix}self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
            shapes |= {f"{prefix}mlp.{name}_proj.weight": (wide, width) for name in ("gate", "up")}
            shapes[f"{prefix}mlp.down_proj.weight"] = (width, wide)
            shapes |= {f"{prefix}{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
        shapes |= {"model.norm.weight": (width,), "lm_head.weight": (self.vocabulary, width)}
        return {name: TensorInfo(DTYPE, shape) for name, shape in shapes.items()}

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors().values())

    def layer_weights(self) -> int:
        """Weights of one layer's matrices."""
        return 4 * self.width**2 + 3 * self.width * self.intermediate


def rows_of(name: str, shape: tuple[int, ...], seed: int = 0) -> Iterator[Tensor]:
    """A tensor as chunks of its rows; a vector, a norm's scale, as one that is near 1."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    if len(shape) == 1:
        yield (1 + 0.1 * torch.randn(shape, generator=generator)).to(DTYPE)
        return
    rows, columns = shape
    i = (CHANNEL_SPREAD * torch.randn(columns, generator=generator)).exp()
    o = (CHANNEL_SPREAD * torch.randn(rows, 1, generator=generator)).exp() * (STD / 2**0.5)
    step = max(1, CHUNK // columns)
    for first in range(0, rows, step):
        part = (min(step, rows - first), columns)
        # t = z / sqrt(χ²(4) / 4), where χ²(4) = -2 log(u v)
        product = (1 - torch.rand(part, generator=generator)).mul_(1 - torch.rand(part, generator=generator))
        t = product.log_().mul_(-0.5).clamp_min_(1e-7).rsqrt_().mul_(torch.randn(part, generator=generator))
        yield t.mul_(o[first : first + step]).mul_(i).to(DTYPE)


def tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """One whole tensor as :func:`write_checkpoint` writes it."""
    return torch.cat(list(rows_of(name, shape, seed)))


def write_checkpoint(
    folder: Path,
    shape: Shape,
    *,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    advance: Callable[[str, int], None] = lambda name, weights: None,
) -> None:
    """Write ``config.json``, the shards and their index; a chunk of a tensor is in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, TensorInfo]] = [{}]
    for name, info in shape.tensors().items():
        if shards[-1] and sum(i.nbytes for i in shards[-1].values()) + info.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = info
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{k + 1:05}-of-{count:05}.safetensors" for k in range(count)]
    for file, tensors in zip(names, shards, strict=True):
        header, begins = header_bytes(tensors)
        with open(folder / file, "wb") as stream:
            stream.write(header)
            for name, info in tensors.items():
                stream.seek(begins[name])
                for chunk in rows_of(name, info.shape, seed):
                    stream.write(memoryview(as_bytes(chunk)))
                    advance(name, chunk.numel())
    if count > 1:
        where = {name: file for file, tensors in zip(names, shards, strict=True) for name in tensors}
        index = {"metadata": {"total_size": shape.nbytes}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1) + "\n", encoding="utf-8")
