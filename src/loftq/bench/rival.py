"""bitsandbytes' 4-bit layer, to compare with where it is installed.

On a CPU with AVX512-BF16 a forward pass in eval mode, without a gradient, repacks the weight in place to other tiles with
bfloat16 scales, which is faster and less exact. So each mode has a layer of its own.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import logging
from typing import Any

import torch
from torch import Tensor, nn

MISSING = 'bitsandbytes is not installed, so nothing is compared with it; pip install "bitsandbytes>=0.49"'
NO_EVAL = "bitsandbytes repacks weights for inference on processors with AVX512-BF16 only, which this one is not"
BLOCK_SIZE = 64
_ENDINGS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def version() -> str | None:
    """The installed version."""
    try:
        return importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        return None


def dequantizer(weight: Tensor) -> Any:
    """A function that dequantizes the matrix's NF4 codes to the dtype of ``weight``; on the CPU always to fresh memory."""
    functional: Any = _quietly("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(weight, blocksize=BLOCK_SIZE, quant_type="nf4")
    return lambda: functional.dequantize_4bit(packed, state)


def dequantizer_into(weight: Tensor, out: Tensor) -> Any:
    """The same by bitsandbytes' own loop, called directly so that it writes to ``out``; no function of its API does.

    ``None`` where its wheel has no compiled loop.
    """
    functional: Any = _quietly("bitsandbytes.functional")
    library: Any = importlib.import_module("bitsandbytes.cextension").lib
    packed, state = functional.quantize_4bit(weight, blocksize=BLOCK_SIZE, quant_type="nf4")
    loop = f"cdequantize_blockwise_cpu_nf4_{_ENDINGS[weight.dtype]}"
    absmax, (rows, columns) = state.absmax.float(), weight.shape
    sizes = [ctypes.c_longlong(size) for size in (BLOCK_SIZE, rows, columns)]

    def into() -> Tensor:
        getattr(library, loop)(*map(functional.get_ptr, (packed, absmax, out)), *sizes)
        return out

    try:
        into()
    except (RuntimeError, NotImplementedError, AttributeError):
        return None
    return into


def linear(weight: Tensor, dtype: torch.dtype, *, training: bool) -> nn.Module:
    """A frozen ``Linear4bit`` (NF4, scales of blocks of 64 not quantized again) of an (out, in) matrix."""
    layers: Any = _quietly("bitsandbytes").nn
    layer = layers.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=dtype, compress_statistics=False, quant_type="nf4"
    )
    layer.weight = layers.Params4bit(
        weight.clone(), requires_grad=False, compress_statistics=False, quant_type="nf4", module=layer
    )
    quantized: nn.Module = layer.to("cpu").train(training)
    return quantized


def repacks(layer: Any) -> bool:
    """Whether eval mode has a path of its own on this machine, for a layer of this shape."""
    out_features, in_features = layer.out_features, layer.in_features
    return bool(layer.support_avx512bf16_for_cpu) and out_features % 32 == 0 and in_features % BLOCK_SIZE == 0


def _quietly(module: str) -> Any:
    """The module, imported without its advice to install `kernels`, with which it would fetch other code from the hub for
    inference; measured is what its own wheel does."""
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return importlib.import_module(module)
    finally:
        logger.setLevel(before)
