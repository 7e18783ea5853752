"""Layers of a quantized model while its adapters, and if asked for its scales, are tuned.

    y = x (Q ∘ C)ᵀ + scaling · (x Aᵀ) Bᵀ + b

Q (out, in) is frozen; A (r, in) and B (out, r) are float32 and trained. C is 1, or one trained factor for each stored
scale. The products run in one chosen dtype: in bfloat16 they are more than twice as fast as in float32 on
processors that have the instructions, while A, B, C and their gradients stay float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loftq import kernels
from loftq.codec.qtensor import packed_codes, stored_levels, stored_scale
from loftq.hub.adapter import split_experts
from loftq.modules import PackedWeight, QuantEmbedding, QuantExperts
from loftq.modules.experts import ExpertFactors

if TYPE_CHECKING:
    from peft import PeftModel


class FrozenMatrix:
    """Q (out, in) of a packed layer: dense in one dtype, or packed and dequantized whenever it is needed.

    Args:
        layer: the packed layer.
        dtype: of the dense matrix.
        dense: keep it; otherwise dequantize for each product.
    """

    def __init__(self, layer: PackedWeight, dtype: torch.dtype, dense: bool) -> None:
        self.tensors = layer._packed_tensors()
        self.spec = layer.spec
        self.shape = layer.matrix_shape
        self.dtype = dtype
        self._dense = layer.dequantize(dtype) if dense else None

    @property
    def has_float_scales(self) -> bool:
        """Whether each scale is stored as a number of its own, not in 8 bits."""
        return not self.spec.double_quant

    @property
    def blocks(self) -> int:
        """Stored scales a row."""
        return -(-self.shape[1] // self.spec.block_size)

    def stored_scale(self) -> Tensor:
        """(out, blocks) float32."""
        return stored_scale(self.tensors)

    def plain(self) -> Tensor:
        """Q (out, in)."""
        return self._dequantize(self.stored_scale()) if self._dense is None else self._dense

    def scaled(self, factor: Tensor | None) -> Tensor:
        """Q ∘ C for factors (out, blocks), or Q."""
        if factor is None:
            return self.plain()
        if self._dense is None:
            return self._dequantize(self.stored_scale() * factor)
        return self._dense * self._spread(factor.to(self.dtype))

    def factor_grad(self, grad: Tensor) -> Tensor:
        """dL/dC (out, blocks) float32 from dL/d(Q ∘ C) (out, in): the sum over a block of dL/dW · Q."""
        product = (grad * self.plain()).float()
        size = self.spec.block_size
        return nn.functional.pad(product, (0, -self.shape[1] % size)).view(self.shape[0], -1, size).sum(2)

    def new_scale(self, factor: Tensor) -> Tensor:
        """The stored scale times C, in the stored dtype. A product beyond its range keeps the old scale."""
        stored = self.tensors["weight_scale"]
        scale = (stored.float() * factor.detach()).to(stored.dtype)
        return torch.where(torch.isfinite(scale), scale, stored)

    def exact_factor(self, factor: Tensor) -> Tensor:
        """C as it is once the product with the stored scale has been rounded; 1 for a scale of 0."""
        stored = self.stored_scale()
        return torch.where(stored == 0, 1.0, self.new_scale(factor).float() / torch.where(stored == 0, 1.0, stored))

    def exact(self, factor: Tensor | None) -> Tensor:
        """Q ∘ C (out, in) in float32, as it is stored in the end."""
        scale = self.stored_scale() if factor is None else self.new_scale(factor).float()
        return self._dequantize(scale, torch.float32)

    def _spread(self, factor: Tensor) -> Tensor:
        return factor.repeat_interleave(self.spec.block_size, 1)[:, : self.shape[1]]

    def _dequantize(self, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        zero = self.tensors.get("weight_zero")
        return kernels.dequantize(
            packed_codes(self.tensors),
            scale,
            stored_levels(self.tensors),
            None if zero is None else zero.float(),
            self.spec.bits,
            self.spec.block_size,
            self.shape[1],
            dtype or self.dtype,
        )


class _AdaptedProduct(torch.autograd.Function):
    """x (n, in) -> (n, out). One node, so that nothing but x, x Aᵀ and the small factors is kept for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, factor: Tensor | None, layer: Any) -> Tensor:
        a, b = lora_A.to(x.dtype), lora_B.to(x.dtype)
        inner = x @ a.T
        y = x @ layer.frozen.scaled(factor).T
        y.addmm_(inner, b.T, alpha=layer.scaling)
        ctx.save_for_backward(x, inner, a, b, factor)
        ctx.layer = layer
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, a, b, factor = ctx.saved_tensors
        layer = ctx.layer
        grad_inner = (grad @ b).mul_(layer.scaling)
        grad_A = (grad_inner.T @ x).float() if ctx.needs_input_grad[1] else None
        grad_B = (grad.T @ inner).float().mul_(layer.scaling) if ctx.needs_input_grad[2] else None
        grad_factor = layer.frozen.factor_grad(grad.T @ x) if ctx.needs_input_grad[3] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ layer.frozen.scaled(factor)
            grad_x.addmm_(grad_inner, a)
        return grad_x, grad_A, grad_B, grad_factor, None


class AdaptedLinear(nn.Module):
    """A packed linear layer with its adapter, to be tuned. ``factor`` is C (out, blocks), or ``None``."""

    def __init__(
        self, frozen: FrozenMatrix, lora_A: Tensor, lora_B: Tensor, scaling: float, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.frozen = frozen
        self.scaling = scaling
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.factor: nn.Parameter | None = None
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def train_scales(self) -> None:
        """Give every stored scale a factor, 1 at first."""
        self.factor = nn.Parameter(torch.ones(self.frozen.shape[0], self.frozen.blocks, device=self.lora_A.device))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(self.frozen.dtype)
        y: Tensor = _AdaptedProduct.apply(flat, self.lora_A, self.lora_B, self.factor, self)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], -1).to(x.dtype)


class AdaptedEmbedding(nn.Module):
    """A packed embedding with its adapter, to be tuned: E[i] + scaling · (B A)ᵀ[i]; A (r, rows), B (columns, r)."""

    def __init__(self, table: QuantEmbedding, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        super().__init__()
        self.table = table
        self.scaling = scaling
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.table(ids)
        inner = nn.functional.embedding(ids, self.lora_A.T)
        return rows + (inner @ self.lora_B.T * self.scaling).to(rows.dtype)


class AdaptedExperts(nn.Module):
    """The adapter of a parameter with packed experts, to be tuned; A (r · E, in) and B (out, r · E) as PEFT keeps them."""

    experts: QuantExperts

    def __init__(self, experts: QuantExperts, parameter: str, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        super().__init__()
        self.__dict__["experts"] = experts  # no child of this one: they are another module's
        self.parameter = parameter
        self.scaling = scaling
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)

    def factors(self) -> ExpertFactors:
        """A and B of each expert."""
        return ExpertFactors(*split_experts(self.lora_A, self.lora_B, self.experts.num_experts), self.scaling)

    def exact(self, expert: int) -> Tensor:
        """Q + scaling · B A (out, in) of one expert in float32."""
        lora_A, lora_B, scaling = self.factors()
        return self.experts.dequantize(self.parameter, expert) + scaling * (lora_B[expert] @ lora_A[expert])


class ExpertsWithAdapters(nn.Module):
    """Packed experts whose adapters are tuned."""

    def __init__(self, experts: QuantExperts, adapters: list[AdaptedExperts]) -> None:
        super().__init__()
        self.experts = experts
        self.adapters = nn.ModuleList(adapters)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        for adapter in self.adapters:
            assert isinstance(adapter, AdaptedExperts)
            self.experts.adapters[adapter.parameter] = [adapter.factors()]
        result: Tensor = self.experts(*args, **kwargs)
        self.experts.adapters.clear()
        return result


Adapted = AdaptedLinear | AdaptedEmbedding | AdaptedExperts


def adapted_model(
    model: PeftModel, factors: dict[str, tuple[Tensor, Tensor]], dtype: torch.dtype, dense: bool
) -> tuple[nn.Module, dict[str, Adapted]]:
    """The base model with every adapted packed layer replaced, and those layers by name.

    Args:
        model: as :func:`loftq.load` returns it.
        factors: module name -> (A, B) in float32, as the adapter's file has them. PEFT may have rounded its own.
        dtype: of the products.
        dense: keep dense copies of the packed matrices.
    """
    from peft.tuners.lora import LoraLayer

    base: Any = model.get_base_model()
    layers: dict[str, Adapted] = {}
    for name, module in list(base.named_modules()):
        packed = getattr(module, "base_layer", None)
        if isinstance(packed, LoraLayer):  # an outer one of two wrappers around experts
            packed = packed.get_base_layer()
        if isinstance(packed, QuantExperts) and not name.endswith(".base_layer"):
            new_experts, own = _adapted_experts(name, module, factors)
            layers.update(own)
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, new_experts)
            continue
        if not isinstance(packed, PackedWeight) or name not in factors:
            continue
        lora_A, lora_B = (t.clone() for t in factors[name])
        scaling = float(module.scaling["default"])
        if isinstance(packed, QuantEmbedding):
            new: Adapted = AdaptedEmbedding(packed, lora_A, lora_B, scaling)
        else:
            new = AdaptedLinear(FrozenMatrix(packed, dtype, dense), lora_A, lora_B, scaling, packed.bias)  # type: ignore[arg-type]
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, new)
        layers[name] = new
    return base, layers


def _adapted_experts(
    name: str, wrapper: Any, factors: dict[str, tuple[Tensor, Tensor]]
) -> tuple[ExpertsWithAdapters, dict[str, Adapted]]:
    """What takes the place of PEFT's wrappers around packed experts, and its adapters by the parameters' names."""
    adapters: dict[str, AdaptedExperts] = {}
    experts = wrapper.get_base_layer()
    while hasattr(wrapper, "base_layer"):
        parameter = wrapper.parameter_name
        lora_A, lora_B = (t.clone() for t in factors[f"{name}.{parameter}"])
        adapters[parameter] = AdaptedExperts(experts, parameter, lora_A, lora_B, float(wrapper.scaling["default"]))
        wrapper = wrapper.base_layer
    return ExpertsWithAdapters(experts, list(adapters.values())), {
        f"{name}.{p}": adapter for p, adapter in adapters.items()
    }
