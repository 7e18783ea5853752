"""The experts of a mixture, packed: one matrix for each expert and projection, dequantized only for the tokens it gets.

transformers keeps the experts of a layer in two parameters, ``gate_up_proj`` (E, 2 · intermediate, hidden) and
``down_proj`` (E, hidden, intermediate), each matrix transposed in some architectures. For the tokens x that the router
sends to expert e with weight p,

    y += p · (W_down[e] gate(W_gate_up[e] x + b_gate_up[e]) + b_down[e])

where ``gate`` is the architecture's own ``_apply_gate``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loftq.codec.qtensor import QuantizedTensor, dequantize_stored, storage_layout
from loftq.config import QuantSpec
from loftq.errors import WeightError
from loftq.modules.ops import packed_product
from loftq.modules.packed import Operands, PackedModule, operands, unshared

PARAMETERS = ("gate_up_proj", "down_proj")


class ExpertFactors(NamedTuple):
    """LoRA of all experts: A (E, r, in), B (E, out, r), and what their product is multiplied by."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float


class QuantExperts(PackedModule):
    """Takes the place of a module with the experts of a layer; see :mod:`loftq.modules.experts`.

    A packed parameter P is a frozen uint8 parameter P (E, out, row bytes), so that PEFT finds it by its name, with the
    buffers P_scale, P_codebook and so on: the tensors of :func:`loftq.codec.storage_layout`, one matrix an expert. What
    else the module has, biases and norms, stays as it is.

    Args:
        dense: the module, on any device; its parameters that are packed are not read.
        specs: parameter -> how each of its matrices is stored.

    Attributes:
        adapters: parameter -> the LoRA factors that count during a call; see :mod:`loftq.hub.experts`.

    Raises:
        WeightError: ``dense`` holds no experts of this form, or ``specs`` is empty or names something else.
    """

    _dense: nn.Module

    def __init__(self, dense: nn.Module, specs: Mapping[str, QuantSpec]) -> None:
        super().__init__()
        if not is_fused_experts(dense) or not specs or not set(specs) <= set(PARAMETERS):
            raise WeightError(
                f"got a {type(dense).__name__} and {', '.join(specs) or 'no parameters'}, expected a module with experts in "
                f"{' and '.join(PARAMETERS)} and at least one of the two"
            )
        self.specs = {name: specs[name] for name in PARAMETERS if name in specs}
        self.is_transposed = bool(getattr(dense, "is_transposed", False))
        self.matrix_shapes = {name: expert_shape(dense, name) for name in self.specs}
        self.num_experts = int(getattr(dense, PARAMETERS[0]).shape[0])
        self.adapters: dict[str, list[ExpertFactors]] = {}
        # the dense module without its tensors: it knows the gate, and what to become again
        self.__dict__["_dense"] = copy.copy(dense)  # not as a child, whose tensors would be saved
        self._dense._parameters = dict.fromkeys(dense._parameters)
        self._is_shardable = False
        self._stored_names: dict[str, dict[str, str]] = {}
        for name, child in dense.named_children():
            self.add_module(name, child)
        for name, buffer in dense.named_buffers(recurse=False):
            self.register_buffer(name, buffer, name not in dense._non_persistent_buffers_set)
        for name, parameter in dense._parameters.items():  # in their order, which PEFT nests its layers by
            if name in self.specs:
                self._register(name)
            else:
                self.register_parameter(name, parameter)
        self.packed_names = tuple(own for names in self._stored_names.values() for own in names.values())

    def _register(self, name: str) -> None:
        layout = storage_layout(self.specs[name], self.matrix_shapes[name], self.num_experts)
        names = self._stored_names[name] = {stored: stored_name(name, stored) for stored in layout}
        for stored, info in layout.items():
            tensor = torch.empty(info.shape, dtype=info.dtype, device="meta")
            if stored == "weight":
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(names[stored], tensor)

    @classmethod
    def from_quantized(cls, dense: nn.Module, quantized: Mapping[str, list[QuantizedTensor]]) -> QuantExperts:
        """A module around the matrices of every expert, by parameter."""
        module = cls(dense, {name: matrices[0].spec for name, matrices in quantized.items()})
        for name, matrices in quantized.items():
            for stored, own in module._stored_names[name].items():
                stack = torch.stack([matrix.tensors[stored] for matrix in matrices])
                setattr(module, own, nn.Parameter(stack, requires_grad=False) if stored == "weight" else stack)
        return module.train(dense.training)

    @property
    def packed_matrices(self) -> list[tuple[tuple[int, int], QuantSpec]]:
        return [(self.matrix_shapes[name], spec) for name, spec in self.specs.items() for _ in range(self.num_experts)]

    def _tensors(self, name: str, expert: int) -> dict[str, Tensor]:
        tensors = {stored: getattr(self, own)[expert] for stored, own in self._stored_names[name].items()}
        return unshared(tensors) if self._is_shardable else tensors

    def make_shardable(self) -> None:
        self._is_shardable = True

    def _operands(self, name: str, expert: int) -> Operands:
        return operands(self._tensors(name, expert), self.specs[name])

    def dequantize(self, name: str, expert: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense (out, in) matrix of one expert."""
        return dequantize_stored(self._tensors(name, expert), self.specs[name], self.matrix_shapes[name][1], dtype)

    def to_dense(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The module that this one took the place of, with the dequantized weights."""
        dense = copy.copy(self._dense)
        dense._parameters = dict(self._parameters)
        dense._modules, dense._buffers = self._modules, {name: self._buffers[name] for name in self._dense._buffers}
        for name in self.specs:
            matrices = [self.dequantize(name, expert, dtype) for expert in range(self.num_experts)]
            stack = torch.stack([matrix.T if self.is_transposed else matrix for matrix in matrices])
            dense._parameters[name] = nn.Parameter(stack, requires_grad=False)
        return dense.train(self.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden_states)
        apply_gate: Any = self._dense._apply_gate
        for expert, tokens, places in self.routed(top_k_index):
            y = self._product(
                "down_proj", expert, apply_gate(self._product("gate_up_proj", expert, hidden_states[tokens]))
            )
            if getattr(self._dense, "has_post_expert_norm", False):
                y = self._modules["post_expert_norm"](y)  # type: ignore[misc]
            y = y * top_k_weights[tokens, places, None]
            result.index_add_(0, tokens, y.to(result.dtype))
        return result

    def routed(self, top_k_index: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(expert, its tokens, at which place of their choice) for every expert that (tokens, k) indices name."""
        chosen, order = torch.sort(top_k_index.flatten(), stable=True)
        names, counts = torch.unique_consecutive(chosen, return_counts=True)
        for expert, entries in zip(names.tolist(), order.split(counts.tolist()), strict=True):
            if expert < self.num_experts:  # a larger one stands for none
                yield expert, entries // top_k_index.shape[-1], entries % top_k_index.shape[-1]

    def _product(self, name: str, expert: int, x: Tensor) -> Tensor:
        if name in self.specs:
            if torch.is_autocast_enabled(x.device.type):
                x = x.to(torch.get_autocast_dtype(x.device.type))
            y = packed_product(x, *self._operands(name, expert))
        else:
            weight: Tensor = getattr(self, name)[expert]
            y = nn.functional.linear(x, weight.T if self.is_transposed else weight)
        bias: Tensor | None = getattr(self, f"{name}_bias", None)
        if bias is not None:
            y = y + bias[expert].to(y.dtype)
        for lora_A, lora_B, scaling in self.adapters.get(name, ()):
            inner = nn.functional.linear(x.to(lora_A.dtype), lora_A[expert])
            y = y + (nn.functional.linear(inner, lora_B[expert]) * scaling).to(y.dtype)
        return y

    def extra_repr(self) -> str:
        packed = [
            f"{n}: bits={s.bits}, codebook={s.codebook}, block_size={s.block_size}" for n, s in self.specs.items()
        ]
        return f"num_experts={self.num_experts}, " + "; ".join(packed)


def stored_name(parameter: str, stored: str) -> str:
    """The name of one of the tensors that a parameter is stored in, such as ``weight_scale``, behind the parameter's own."""
    return parameter + stored.removeprefix("weight")


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module holds all experts of a layer in the two parameters that :class:`QuantExperts` can pack."""
    three = all(getattr(getattr(module, name, None), "ndim", 0) == 3 for name in PARAMETERS)
    return three and hasattr(module, "_apply_gate") and getattr(module, "has_gate", True)


def fused_experts(model: nn.Module) -> list[str]:
    """Names of the parameters ``….gate_up_proj`` and ``….down_proj`` that hold all experts of a layer."""
    return [f"{name}.{p}" for name, module in model.named_modules() if is_fused_experts(module) for p in PARAMETERS]


def expert_shape(module: nn.Module, name: str) -> tuple[int, int]:
    """(out, in) of each matrix in a parameter with experts."""
    _, rows, columns = getattr(module, name).shape
    return (columns, rows) if getattr(module, "is_transposed", False) else (rows, columns)
