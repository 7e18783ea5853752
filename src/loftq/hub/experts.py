"""LoRA on packed experts: PEFT's wrapper of a parameter, for parameters that are no floating-point tensors.

PEFT adapts a three-dimensional parameter (``target_parameters``) by replacing it with W + scaling · B A while the module
runs, which would dequantize all experts at once. Here the module is given A and B instead and adds ``scaling · B A x`` for
each expert that has tokens. Names, shapes and the adapter's file are PEFT's own.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft.tuners.lora.layer as lora_layer
import peft.utils.transformers_weight_conversion as older
from peft.tuners.lora.model import LoraModel
from torch import nn

from loftq.errors import ConfigError
from loftq.hub.adapter import names_current_modules, split_experts
from loftq.modules import PackedModule, QuantExperts
from loftq.modules.experts import ExpertFactors, fused_experts


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
    """Let PEFT adapt packed experts, and the layers beside them that bear the names which experts once had.

    It wraps packed experts in :class:`ParamWrapper`, takes a config that is written for the model as it is by its word
    (:func:`_is_current`), and does not warn of ranks that it applies (:func:`_applied_patterns`).

    PEFT's own extension point, a config's custom modules, is out of reach in ``PeftModel.from_pretrained``, which makes the
    config itself. So it is filled in when PEFT chooses the class of a new layer.
    """
    create, inject = LoraModel._create_new_module, LoraModel.inject_adapter
    convert = older.convert_peft_config_for_transformers
    if getattr(create, "_knows_packed_experts", False):
        return

    def create_new_module(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if isinstance(base, QuantExperts) and kwargs.get("parameter_name") is not None:
            lora_config._register_custom_module({QuantExperts: ParamWrapper})
        new: nn.Module = create(lora_config, adapter_name, target, **kwargs)
        return new

    def convert_config(peft_config: Any, model: nn.Module, conversions: Any) -> None:
        if not _is_current(peft_config, model):
            convert(peft_config, model, conversions)

    def inject_adapter(self: LoraModel, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        with _applied_patterns(self.peft_config[adapter_name], model):
            inject(self, model, adapter_name, *args, **kwargs)

    create_new_module._knows_packed_experts = True  # type: ignore[attr-defined]
    LoraModel._create_new_module = staticmethod(create_new_module)
    LoraModel.inject_adapter = inject_adapter
    older.convert_peft_config_for_transformers = convert_config


def _targeted(peft_config: Any, model: nn.Module) -> list[str]:
    """The parameters that a config's ``target_parameters`` name."""
    targets = tuple(getattr(peft_config, "target_parameters", None) or ())
    names = [name.replace(".base_layer", "") for name, _ in model.named_parameters()] if targets else []
    return [name for name in names if any(name == t or name.endswith(f".{t}") for t in targets)]


def _is_current(peft_config: Any, model: nn.Module) -> bool:
    """Whether a config is for the model as it is, rather than for an older transformers with a module for each expert.

    For many architectures PEFT reads ``gate_proj``, ``up_proj`` and ``down_proj`` as such experts' names, and leaves the layers
    of a shared expert or a dense block, which bear them still, without an adapter. But a packed model has no older
    adapters, and no older config is marked as current or names the parameters in which experts are now.
    """
    if names_current_modules(peft_config) or any(isinstance(module, PackedModule) for module in model.modules()):
        return True
    experts = {name.replace(".base_layer", "") for name in fused_experts(model)}
    return not experts.isdisjoint(_targeted(peft_config, model))


@contextmanager
def _applied_patterns(peft_config: Any, model: nn.Module) -> Iterator[None]:
    """Without PEFT's warning of ``rank_pattern`` and ``alpha_pattern`` keys that it ignores, where parameters have those keys.

    PEFT looks for them among the adapted modules alone, though it gives a parameter the rank of the key that matches it.
    """
    named = _targeted(peft_config, model)
    keys = {*(getattr(peft_config, "rank_pattern", None) or ()), *(getattr(peft_config, "alpha_pattern", None) or ())}
    applied = [key for key in sorted(keys) if any(re.match(rf"(.*\.)?({key})$", name) for name in named)]
    with warnings.catch_warnings():
        if applied:
            one = f"({'|'.join(re.escape(repr(key)) for key in applied)})"
            message = rf"The following (rank|alpha)_pattern keys .*: \[{one}(, {one})*\]\.$"
            warnings.filterwarnings("ignore", message, RuntimeWarning)
        yield
