"""The loops that touch every weight. Tensors in, tensors out.

Each function here has one definition in :mod:`loftq.kernels.reference`, in plain torch, which runs on any device. On the
CPU compiled loops compute the same (:mod:`loftq.kernels.cpu`) where numba loads, on a GPU Triton's
(:mod:`loftq.kernels.triton_kernels`) where Triton is installed.

Shapes: weight (rows, in) float32; codes (rows, in) uint8; packed (rows, ceil(in * bits / 8)) uint8; scale and zero
(rows, ceil(in / block_size)) float32; codebook (2^bits,) float32 ascending and thresholds (2^bits - 1,) float32, or
(rows, 2^bits) and (rows, 2^bits - 1) with levels of each row's own.
"""

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from loftq.errors import LoftQWarning
from loftq.kernels.reference import packed_row_bytes

__all__ = [
    "compiles",
    "dequantize",
    "descend",
    "descend_coupled",
    "encode",
    "feedback",
    "few_tokens",
    "grad_product",
    "level_moments",
    "pack",
    "packed_row_bytes",
    "product",
    "search_affine",
    "search_scale",
    "unpack",
]

TOKENS_AT_ONCE = 256
"""So many the CPU's product has in an order of its own, and their float32 sums: what the second-level cache holds."""

# Device types that Triton compiles for; torch calls ROCm's devices "cuda" too.
_TRITON_DEVICES = ("cuda", "xpu")
_forced: ModuleType | None = None


@cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"loftq.kernels.{name}")


def compiles() -> bool:
    """Whether numba works here, which compiles the CPU's loops; without it the reference takes their place."""
    return _compiled().__name__.endswith(".cpu")


@cache
def _compiled() -> ModuleType:
    try:
        return _module("cpu")
    except ImportError as error:
        warnings.warn(
            f"numba does not load ({error}), so loftq computes with plain torch on the CPU, many times slower; install a "
            f"numba that fits this Python and numpy",
            LoftQWarning,
            stacklevel=2,
        )
        return _module("reference")


@cache
def _backend_of(device_type: str) -> ModuleType:
    if device_type == "cpu":
        return _compiled()
    if device_type in _TRITON_DEVICES and find_spec("triton") is not None:
        return _module("triton_kernels")
    return _module("reference")


def _backend(tensor: Tensor) -> ModuleType:
    """The module whose functions compute on a tensor's device; all have the names and arguments of ``reference``'s."""
    return _forced or _backend_of(tensor.device.type)


@contextmanager
def _only(name: str) -> Iterator[None]:
    """Everything by one module, ``cpu``, ``reference`` or ``triton_kernels``, on whatever device: for tests."""
    global _forced
    before, _forced = _forced, _module(name)
    try:
        yield
    finally:
        _forced = before


def few_tokens(device_type: str, dtype: torch.dtype) -> int:
    """Up to so many tokens of a dtype :func:`product` beats writing the matrix on such a device.

    0 where it never does, and of a dtype for which its float32 sums are not enough.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return 0
    few: int = (_forced or _backend_of(device_type)).few_tokens(dtype)
    return few


def _counts(weight: Tensor, importance: Tensor | None) -> Tensor:
    return weight.new_ones(weight.shape[1]) if importance is None else importance.to(weight)


def pack(codes: Tensor, bits: int) -> Tensor:
    """(rows, n) uint8 codes -> (rows, ceil(n * bits / 8)) uint8."""
    return _backend(codes).pack(codes, bits)


def unpack(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """The inverse of :func:`pack`."""
    return _backend(packed).unpack(packed, bits, in_features)


def dequantize(
    packed: Tensor,
    scale: Tensor,
    codebook: Tensor,
    zero: Tensor | None,
    bits: int,
    block_size: int,
    in_features: int,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    blocks: tuple[int, int] | None = None,
) -> Tensor:
    """value = scale * (codebook[code] + zero * codebook[1]) as a dense (rows, in_features) matrix of ``dtype``.

    ``out``, on the CPU, is memory of that shape and dtype to write to: a fresh large tensor costs several times the
    computation, because the system has to provide its pages. ``blocks`` are the first and the last but one of those whose
    columns are wanted, instead of all. Scales may be float32, float16 or bfloat16.
    """
    backend, args = _backend(packed), (packed, scale, codebook, zero, bits, block_size, in_features, dtype)
    if blocks is None:
        return backend.dequantize(*args, out)
    if backend.__name__.endswith(".cpu"):
        return backend.dequantize(*args, out, blocks)
    part: Tensor = backend.dequantize(*args)[:, blocks[0] * block_size : blocks[1] * block_size]
    return part if out is None else out.copy_(part)


def product(
    x: Tensor, packed: Tensor, scale: Tensor, codebook: Tensor, zero: Tensor | None, bits: int, block_size: int
) -> Tensor:
    """x (tokens, in) Wᵀ -> (tokens, rows) in x's dtype without writing W; sums are float32. Up to :func:`few_tokens`.

    On a GPU, several half-precision tokens are multiplied with W rounded to their dtype, as a dense product would.
    """
    return _backend(packed).product(x, packed, scale, codebook, zero, bits, block_size)


def grad_product(
    grad: Tensor,
    packed: Tensor,
    scale: Tensor,
    codebook: Tensor,
    zero: Tensor | None,
    bits: int,
    block_size: int,
    in_features: int,
) -> Tensor:
    """grad (tokens, rows) W -> (tokens, in) in grad's dtype without writing W; sums are float32. See :func:`product`."""
    return _backend(packed).grad_product(grad, packed, scale, codebook, zero, bits, block_size, in_features)


def encode(
    weight: Tensor, scale: Tensor, zero: Tensor | None, codebook: Tensor, thresholds: Tensor, block_size: int
) -> Tensor:
    """The code of the level nearest to each weight; where the scale is 0, the code of the level nearest to 0."""
    return _backend(weight).encode(weight, scale, zero, codebook, thresholds, block_size)


def search_scale(
    weight: Tensor,
    codebook: Tensor,
    thresholds: Tensor,
    factors: Tensor,
    refine: int,
    block_size: int,
    importance: Tensor | None = None,
) -> Tensor:
    """The best of ``absmax * factors`` per block in squared error, then refitted by least squares.

    ``importance`` (in,) is what the squared error of each column counts; ``None`` for all alike.
    """
    counts = _counts(weight, importance)
    return _backend(weight).search_scale(weight, counts, codebook, thresholds, factors, refine, block_size)


def search_affine(
    weight: Tensor,
    codebook: Tensor,
    thresholds: Tensor,
    factors: Tensor,
    refine: int,
    block_size: int,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The best (scale, zero) per block over shrunken min/max ranges, each refitted by (weighted) least squares."""
    counts = _counts(weight, importance)
    return _backend(weight).search_affine(weight, counts, codebook, thresholds, factors, refine, block_size)


def level_moments(
    weight: Tensor,
    scale: Tensor,
    codes: Tensor,
    levels: int,
    block_size: int,
    importance: Tensor | None = None,
    by_row: bool = False,
) -> tuple[Tensor, Tensor]:
    """For each level k: sum of h * scale * w and sum of h * scale^2 over the elements with code k, float64.

    (levels,), or (rows, levels) ``by_row``.
    """
    counts = _counts(weight, importance)
    return _backend(weight).level_moments(weight, counts, scale, codes, levels, block_size, by_row)


def feedback(
    work: Tensor,
    inverse: Tensor,
    order: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    codebook: Tensor,
    thresholds: Tensor,
    block_size: int,
    columns: tuple[int, int],
    codes: Tensor,
    dense: Tensor,
) -> Tensor:
    """Round the columns of ``work`` from ``columns[0]`` to ``columns[1]`` one after the other (GPTQ).

    After column j its error ``e = (work_j - value) / inverse_jj`` is taken out of the columns after it within the range:
    ``work_i -= e * inverse_ji``. ``work`` (rows, in) and ``inverse`` (in, in), upper triangular, have their columns in
    ``order`` (in,); ``codes`` and ``dense`` (rows, in), which receive the result, have the matrix's own.

    Returns:
        the errors e (rows, columns[1] - columns[0]), for the columns beyond the range.
    """
    constants = (scale, zero, codebook, thresholds, block_size)
    return _backend(work).feedback(work, inverse, order, *constants, columns, codes, dense)


def descend(
    gradient: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    codebook: Tensor,
    thresholds: Tensor,
    block_size: int,
    codes: Tensor,
    dense: Tensor,
    sweeps: int,
    refit: bool,
) -> None:
    """Coordinate descent on ``tr((W - dense) H (W - dense)^T)``: each code in turn takes its best value, given the others.

    With ``refit`` each block's scale follows by least squares after its codes. Never raises the objective. Everything is
    changed in place: ``gradient = (W - dense) H`` (rows, in), ``scale`` (rows, blocks), ``codes`` and ``dense`` (rows, in).
    """
    constants = (zero, codebook, thresholds, block_size)
    _backend(gradient).descend(gradient, hessian, scale, *constants, codes, dense, sweeps, refit)


def descend_coupled(
    error: Tensor,
    hessian: Tensor,
    coupling: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    codebook: Tensor,
    thresholds: Tensor,
    block_size: int,
    codes: Tensor,
    dense: Tensor,
    refit: bool,
) -> None:
    """One sweep of coordinate descent on ``tr(G E H E^T)``, ``E = W - dense`` = ``error`` (rows, in), ``G`` = ``coupling``.

    Like :func:`descend`, which is the case G = I; but errors of one row can make up for those of another, so the rows are
    visited one after the other. ``error`` is left as it was.
    """
    constants = (zero, codebook, thresholds, block_size)
    _backend(error).descend_coupled(error, hessian, coupling, scale, *constants, codes, dense, refit)
