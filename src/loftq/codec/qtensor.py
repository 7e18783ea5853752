"""A quantized matrix: packed codes, scales and codebook, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loftq import kernels
from loftq.codec import packing
from loftq.codec.scales import DTYPES, GROUP, double_dequantize
from loftq.config import QuantSpec
from loftq.errors import WeightError


class TensorInfo(NamedTuple):
    """Dtype and shape of a tensor that need not exist yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def storage_layout(spec: QuantSpec, shape: tuple[int, int], experts: int = 0) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of the tensors that a (out, in) matrix is stored in; names as in a state dict.

    With ``experts`` there are so many matrices of that shape, and each tensor has a dimension for them in front.
    """
    out_features, in_features = shape
    blocks = -(-in_features // spec.block_size)
    scale_dtype = DTYPES[spec.scale_dtype]
    row_bytes = packing.packed_row_bytes(in_features, spec.bits)
    # never the dense weight's own shape, which 8 bits would give: a program that does not know the format must fail to
    # load it, not take codes for weights
    packed = (out_features, row_bytes, 1) if row_bytes == in_features else (out_features, row_bytes)
    layout = {
        "weight": TensorInfo(torch.uint8, packed),
        "weight_codebook": TensorInfo(torch.float32, (2**spec.bits,)),
        "weight_scale": TensorInfo(torch.uint8 if spec.double_quant else scale_dtype, (out_features, blocks)),
    }
    if spec.codebook == "lloyd-channel":  # bfloat16 has float32's range, so that a factor can go into the levels
        layout["weight_codebook"] = TensorInfo(torch.bfloat16, (out_features, 2**spec.bits))
    if spec.codebook == "uniform":
        layout["weight_zero"] = TensorInfo(scale_dtype, (out_features, blocks))
    if spec.double_quant:
        layout["weight_scale_absmax"] = TensorInfo(torch.float32, (-(-out_features * blocks // GROUP),))
        layout["weight_scale_offset"] = TensorInfo(torch.float32, ())
    if experts:
        return {name: TensorInfo(info.dtype, (experts, *info.shape)) for name, info in layout.items()}
    return layout


@dataclass(frozen=True)
class QuantizedTensor:
    """W (out, in) stored as ``scale * (codebook[code] + zero * codebook[1])``, one scale and zero a block of a row.

    The codebook is one for the matrix, or one for each row. ``tensors`` holds exactly what :func:`storage_layout` lists.
    ``zero`` exists for the affine ``uniform`` codebook only, in units of its step ``codebook[1]``.
    """

    tensors: Mapping[str, Tensor]
    spec: QuantSpec
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        expected = storage_layout(self.spec, self.shape)
        problems = [f"{name} is missing" for name in expected if name not in self.tensors]
        problems += [f"{name} is unexpected" for name in self.tensors if name not in expected]
        problems += [
            f"{name} is {t.dtype} {tuple(t.shape)}, expected {expected[name].dtype} {expected[name].shape}"
            for name, t in self.tensors.items()
            if name in expected and (t.dtype, tuple(t.shape)) != expected[name]
        ]
        if problems:
            raise WeightError(f"tensors do not form a {self.shape} matrix of {self.spec}: {'; '.join(problems)}")

    def scale(self) -> Tensor:
        """(out, blocks) float32 scales, as stored."""
        return stored_scale(self.tensors)

    def zero(self) -> Tensor | None:
        """(out, blocks) float32 zero points in units of the codebook's step, for the affine codebook only."""
        zero = self.tensors.get("weight_zero")
        return None if zero is None else zero.float()

    def codes(self) -> Tensor:
        """(out, in) uint8 codes."""
        return packing.unpack(packed_codes(self.tensors), self.spec.bits, self.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """The dense (out, in) matrix; ``out`` is contiguous memory of that shape and dtype for it.

        Raises:
            WeightError: ``out`` is something else.
        """
        return dequantize_stored(self.tensors, self.spec, self.shape[1], dtype, out)

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """The stored tensors under ``prefix`` (``"model.layer."`` gives ``model.layer.weight`` and so on)."""
        return {prefix + name: tensor for name, tensor in self.tensors.items()}

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, int], prefix: str = ""
    ) -> QuantizedTensor:
        """The inverse of :meth:`state_dict`; ignores what does not belong to this matrix.

        Raises:
            WeightError: if a tensor is missing or has another dtype or shape.
        """
        names = storage_layout(spec, shape)
        return cls({n: state_dict[prefix + n] for n in names if prefix + n in state_dict}, spec, shape)

    def times(self, factor: float) -> QuantizedTensor:
        """The matrix multiplied by a number, which goes into the codebook."""
        if factor == 1.0:
            return self
        codebook = self.tensors["weight_codebook"]
        codebook = (codebook.double() * factor).to(codebook.dtype)
        return QuantizedTensor({**self.tensors, "weight_codebook": codebook}, self.spec, self.shape)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        return QuantizedTensor({n: t.to(device) for n, t in self.tensors.items()}, self.spec, self.shape)

    @property
    def nbytes(self) -> int:
        """Stored bytes: codes, scales, zeros and codebook."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Measured from stored bytes."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])


def packed_codes(tensors: Mapping[str, Tensor]) -> Tensor:
    """(out, row bytes) uint8 from a matrix's stored tensors."""
    return tensors["weight"].flatten(1)


def stored_scale(tensors: Mapping[str, Tensor]) -> Tensor:
    """(out, blocks) float32 scales from a matrix's stored tensors."""
    scale = tensors["weight_scale"]
    if "weight_scale_absmax" in tensors:
        return double_dequantize(scale, tensors["weight_scale_absmax"], tensors["weight_scale_offset"])
    return scale.float()


def stored_levels(tensors: Mapping[str, Tensor]) -> Tensor:
    """float32 levels from a matrix's stored tensors, (2^bits,) or (out, 2^bits)."""
    return tensors["weight_codebook"].float()


def dequantize_stored(
    tensors: Mapping[str, Tensor],
    spec: QuantSpec,
    in_features: int,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """The dense matrix from its stored tensors; ``out`` is memory for it, which is used on the CPU.

    Raises:
        WeightError: ``out`` has another shape or dtype, or is not contiguous.
    """
    shape = (tensors["weight"].shape[0], in_features)
    if out is not None and not (tuple(out.shape) == shape and out.dtype == dtype and out.is_contiguous()):
        raise WeightError(
            f"out is {out.dtype} of shape {tuple(out.shape)} and strides {out.stride()}, expected contiguous memory of "
            f"{dtype} and shape {shape}"
        )
    zero = tensors.get("weight_zero")
    return kernels.dequantize(
        packed_codes(tensors),
        stored_scale(tensors),
        stored_levels(tensors),
        None if zero is None else zero.float(),
        spec.bits,
        spec.block_size,
        in_features,
        dtype,
        out,
    )
