"""LoRA on packed experts: PEFT's wrapper of a parameter, for parameters that are no floating-point tensors.

PEFT adapts a three-dimensional parameter (``target_parameters``) by replacing it with W + scaling · B A while the module
runs, which would dequantize all experts at once. Here the module is given A and B instead and adds ``scaling · B A x`` for
each expert that has tokens. Names, shapes and the adapter's file are PEFT's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft.tuners.lora.layer as lora_layer
from peft.tuners.lora.model import LoraModel
from torch import nn

from loftq.errors import ConfigError
from loftq.hub.adapter import split_experts
from loftq.modules import QuantExperts
from loftq.modules.experts import ExpertFactors


# PEFT recognises its wrappers by this name
class ParamWrapper(lora_layer.ParamWrapper):
    """PEFT's ``ParamWrapper`` around :class:`loftq.QuantExperts`."""

    def _packed(self) -> QuantExperts | None:
        """The packed experts, unless the parameter is dense."""
        base = self.get_base_layer()
        return base if isinstance(base, QuantExperts) and self.parameter_name in base.specs else None

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int] | tuple[None, None]:
        packed = self._packed()
        if packed is None:
            return super()._get_in_out_features(module)
        self.num_experts, self._param_ndim = packed.num_experts, 3
        rows, columns = packed.matrix_shapes[self.parameter_name]
        # as the dense parameter has them; PEFT exchanges the two where it is (E, out, in)
        return (columns, rows) if packed.is_transposed else (rows, columns)

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        packed = self._packed()
        if packed is None:
            with super()._activate_lora(active_adapters):
                yield
            return
        packed.adapters[self.parameter_name] = [
            ExpertFactors(
                *split_experts(self.lora_A[name].weight, self.lora_B[name].weight, self.num_experts), self.scaling[name]
            )
            for name in active_adapters
            if name in self.lora_A
        ]
        try:
            yield
        finally:
            del packed.adapters[self.parameter_name]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge into experts that have been dequantized.

        Raises:
            ConfigError: they are packed.
        """
        if self._packed() is not None:
            raise ConfigError(
                f"{self.parameter_name} is packed, expected dense weights to merge an adapter into; use `loftq export`"
            )
        super().merge(safe_merge, adapter_names)


def register_with_peft() -> None:
    """Let PEFT wrap the parameters of packed experts in :class:`ParamWrapper`.

    PEFT's own extension point, a config's custom modules, is out of reach in ``PeftModel.from_pretrained``, which makes the
    config itself. So it is filled in when PEFT chooses the class of a new layer.
    """
    create = LoraModel._create_new_module
    if getattr(create, "_knows_packed_experts", False):
        return

    def create_new_module(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if isinstance(base, QuantExperts) and kwargs.get("parameter_name") is not None:
            lora_config._register_custom_module({QuantExperts: ParamWrapper})
        new: nn.Module = create(lora_config, adapter_name, target, **kwargs)
        return new

    create_new_module._knows_packed_experts = True  # type: ignore[attr-defined]
    LoraModel._create_new_module = staticmethod(create_new_module)
