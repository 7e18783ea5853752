"""What all packed layers share: the stored tensors as buffers, and their protection against dtype casts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loftq.codec.qtensor import QuantizedTensor, dequantize_stored, packed_codes, storage_layout
from loftq.config import QuantSpec

Operands = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, int, int]


class PackedModule(nn.Module):
    """A module that holds packed matrices. ``.to(dtype)``, ``.half()`` and the like leave their tensors, ``packed_names``,
    as they are: only the device follows."""

    packed_names: tuple[str, ...]

    @property
    def packed_matrices(self) -> list[tuple[tuple[int, int], QuantSpec]]:
        """(rows, columns) of every matrix, and how it is stored."""
        raise NotImplementedError

    @property
    def packed_weights(self) -> int:
        """How many weights the packed tensors stand for."""
        return sum(rows * columns for (rows, columns), _ in self.packed_matrices)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        before = {name: self._buffers[name] for name in self.packed_names if name in self._buffers}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers.get(name)
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class PackedWeight(PackedModule):
    """Mixin of a layer whose ``weight`` is a packed (rows, columns) matrix held in buffers.

    The buffers are named as :func:`loftq.codec.storage_layout` names them: ``weight`` (uint8), ``weight_scale``,
    ``weight_codebook`` and, where the spec asks for them, ``weight_zero``, ``weight_scale_absmax``,
    ``weight_scale_offset``.
    """

    weight: Any
    spec: QuantSpec
    matrix_shape: tuple[int, int]

    def _register_packed(self, spec: QuantSpec, shape: tuple[int, int], device: Any = None) -> None:
        self.spec = spec
        self.matrix_shape = shape
        layout = storage_layout(spec, shape)
        self.packed_names = tuple(layout)
        for name, info in layout.items():
            self.register_buffer(name, torch.empty(info.shape, dtype=info.dtype, device=device))

    def _set_quantized(self, quantized: QuantizedTensor) -> None:
        for name, tensor in quantized.tensors.items():
            setattr(self, name, tensor)

    @property
    def packed_matrices(self) -> list[tuple[tuple[int, int], QuantSpec]]:
        return [(self.matrix_shape, self.spec)]

    def _packed_tensors(self) -> dict[str, Tensor]:
        tensors = {name: getattr(self, name) for name in self.packed_names}
        tensors["weight"] = tensors["weight"].view(torch.uint8)  # see present_as_int8
        if "weight" in self._parameters and tensors["weight"].device.type == "cpu":
            # the kernels share it with numpy, and memory that numpy has seen could not be freed between the passes
            tensors["weight"] = tensors["weight"].detach().clone()
        return tensors

    def make_shardable(self) -> None:
        """Hold the packed bytes as a frozen parameter from now on: of those FSDP2 gives each process a part, of buffers not."""
        packed = self._buffers.pop("weight", None)
        if packed is not None:
            self.register_parameter("weight", nn.Parameter(packed, requires_grad=False))

    @property
    def quantized(self) -> QuantizedTensor:
        """The stored tensors as a :class:`QuantizedTensor` (no copy)."""
        return QuantizedTensor(self._packed_tensors(), self.spec, self.matrix_shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense matrix, (out, in) for a linear layer."""
        return dequantize_stored(self._packed_tensors(), self.spec, self.matrix_shape[1], dtype)

    def _operands(self) -> Operands:
        return operands(self._packed_tensors(), self.spec)

    def present_as_int8(self) -> None:
        """Show the same bytes as int8 from now on; they are still saved as uint8.

        T5's feed-forward casts its activations to ``wo.weight.dtype`` unless that is int8, its sign for a quantized
        weight; uint8 would destroy them.
        """
        self.weight = self.weight.view(torch.int8)
        self.register_state_dict_post_hook(_save_as_uint8)

    def extra_repr(self) -> str:
        spec = self.spec
        return f"{super().extra_repr()}, bits={spec.bits}, codebook={spec.codebook}, block_size={spec.block_size}"


def operands(tensors: Mapping[str, Tensor], spec: QuantSpec) -> Operands:
    """What the operators of :mod:`loftq.modules.ops` take after their first argument: the stored tensors, not copies."""
    return (
        packed_codes(tensors),
        tensors["weight_scale"],
        tensors["weight_codebook"],
        tensors.get("weight_zero"),
        tensors.get("weight_scale_absmax"),
        tensors.get("weight_scale_offset"),
        spec.bits,
        spec.block_size,
    )


def _save_as_uint8(module: PackedWeight, state_dict: dict[str, Tensor], prefix: str, _: Any) -> None:
    state_dict[prefix + "weight"] = state_dict[prefix + "weight"].view(torch.uint8)
