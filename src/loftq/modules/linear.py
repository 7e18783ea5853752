"""A linear layer whose weight stays packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from loftq.codec import QuantizedTensor, quantize
from loftq.config import QuantSpec
from loftq.errors import WeightError
from loftq.modules.ops import packed_product
from loftq.modules.packed import PackedWeight


class QuantLinear(PackedWeight, nn.Linear):
    """``y = x Wᵀ + b`` with W (out, in) packed in 2, 3, 4 or 8 bits, of which no dense copy outlives a call.

    A subclass of :class:`torch.nn.Linear`, so PEFT wraps it like any other. ``weight`` is the packed uint8 buffer; it
    gets no gradient, the input and the bias do. Under autocast the product runs in the autocast dtype, otherwise in the
    input's. Build one with :meth:`from_linear`.

    Attributes:
        was_conv1d: it took the place of a transformers ``Conv1D``, which stores the transposed matrix.
    """

    was_conv1d = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        spec: QuantSpec,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate a dense weight
        self.in_features = in_features
        self.out_features = out_features
        self._register_packed(spec, (out_features, in_features), device)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None  # type: ignore[assignment]

    @classmethod
    def from_linear(cls, linear: nn.Module, spec: QuantSpec) -> QuantLinear:
        """Quantize a ``torch.nn.Linear`` or transformers' ``Conv1D`` (GPT-2), keeping its bias, device and mode.

        Raises:
            WeightError: for another kind of layer, or a weight with NaN or infinite elements.
        """
        weight = dense_weight(linear)
        layer = cls.from_quantized(quantize(weight, spec), linear.bias)  # type: ignore[arg-type]
        layer.was_conv1d = is_transposed(linear)
        return layer.train(linear.training)

    @classmethod
    def from_quantized(cls, quantized: QuantizedTensor, bias: Tensor | None = None) -> QuantLinear:
        """A layer around an existing quantized matrix; nothing is copied."""
        out_features, in_features = quantized.shape
        layer = cls(in_features, out_features, bias is not None, spec=quantized.spec, device="meta")
        layer._set_quantized(quantized)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    @property
    def W_q(self) -> Tensor:
        """The packed weight. Having one by this name, HQQ's, is what makes PEFT ask for :meth:`dequantize` in DoRA."""
        return self.weight

    def reset_parameters(self) -> None:
        """Nothing to reset: the backbone is loaded, not initialised."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features or not x.is_floating_point():  # the kernels would read what is not there
            raise WeightError(
                f"got an input of shape {tuple(x.shape)} and {x.dtype}, expected floating-point numbers of shape "
                f"(..., {self.in_features}), as a dense layer would"
            )
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = packed_product(x, *self._operands())
        return y if self.bias is None else y + self.bias.to(y.dtype)


def is_transposed(module: nn.Module) -> bool:
    """Whether the layer is transformers' ``Conv1D``, which stores its weight as (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def dense_weight(linear: nn.Module) -> Tensor:
    """The (out, in) weight of a linear layer or ``Conv1D``.

    Raises:
        WeightError: for any other module, and for a layer that is packed already.
    """
    if is_transposed(linear):
        weight: Tensor = linear.weight  # type: ignore[assignment]
        return weight.detach().T.contiguous()
    if isinstance(linear, PackedWeight) or not isinstance(linear, nn.Linear):
        raise WeightError(
            f"got a {type(linear).__name__}, expected a dense torch.nn.Linear or a transformers Conv1D to quantize"
        )
    return linear.weight.detach()
