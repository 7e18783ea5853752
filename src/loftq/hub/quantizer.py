"""The transformers quantizer of ``quant_method: loftq``: it puts packed layers in place before the weights are loaded.

Registered by ``import loftq``. Without that, transformers loads such a folder with a hard size mismatch, because the
packed ``weight`` has another shape than the dense one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from loftq.config import QuantSpec
from loftq.errors import SourceError
from loftq.modules import PackedModule, PackedWeight, QuantEmbedding, QuantExperts, QuantLinear
from loftq.modules.experts import fused_experts, is_fused_experts
from loftq.modules.linear import is_transposed

FORMAT_VERSION = 1


@register_quantization_config("loftq")
class LoftQQuantizationConfig(QuantizationConfigMixin):
    """``quantization_config`` of a quantized folder.

    Args:
        spec: the :class:`loftq.QuantSpec` of most modules, as a dict.
        modules: name of every packed module -> the fields in which its spec differs, mostly none.
        format_version: of the stored tensors; see ``docs/format.md``.

    Raises:
        SourceError: for a format this version does not know.
    """

    def __init__(
        self,
        spec: dict[str, Any] | None = None,
        modules: dict[str, dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = "loftq",
        **unknown: Any,
    ) -> None:
        if format_version != FORMAT_VERSION or unknown:
            raise SourceError(
                f"the quantization_config has format_version {format_version} and fields {sorted(unknown)}, expected "
                f"version {FORMAT_VERSION} and no others; install the version of loftq that wrote it"
            )
        self.quant_method = "loftq"
        self.format_version = format_version
        self.spec = QuantSpec.from_dict(spec or {}).to_dict()
        self.modules = {name: dict(changes) for name, changes in (modules or {}).items()}

    def module_specs(self) -> dict[str, QuantSpec]:
        """Module name -> its spec."""
        base = QuantSpec.from_dict(self.spec)
        return {name: base.replace(**changes) for name, changes in self.modules.items()}

    @classmethod
    def for_specs(cls, base: QuantSpec, specs: dict[str, QuantSpec]) -> LoftQQuantizationConfig:
        """The config that records each module's difference from ``base``."""
        default = base.to_dict()
        return cls(
            spec=default,
            modules={n: {k: v for k, v in s.to_dict().items() if v != default[k]} for n, s in specs.items()},
        )


@register_quantizer("loftq")
class LoftQHfQuantizer(HfQuantizer):
    """Loads, saves, trains (through adapters) and dequantizes models that ``loftq`` has packed."""

    requires_calibration = True  # only folders that are quantized already can be loaded through transformers
    quantization_config: LoftQQuantizationConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        specs = self.quantization_config.module_specs()
        names = {n for n, _ in model.named_modules()} | set(fused_experts(model))
        found = {find_name(n, names, getattr(model, "base_model_prefix", "")): spec for n, spec in specs.items()}
        place_packed(model, {name: spec for name, spec in found.items() if name is not None})
        if specs and set(found) == {None}:
            raise SourceError(
                f"none of the {len(specs)} packed modules ({next(iter(specs))}, ...) exists in {type(model).__name__}; "
                f"load the folder with the class its config.json names"
            )
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        present_for_dtype_checks(model)
        save_experts_whole(model)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return restore_conv1d(dequantize_modules(model, dtype))

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What ``save_pretrained`` writes: the backbone alone, also of a model that PEFT has put an adapter on."""
        from loftq.hub.backbone import unwrapped_state

        return unwrapped_state(model), {}

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def find_name(recorded: str, modules: Any, prefix: str) -> str | None:
    """The name of a recorded module in a model that may be another head's class on the same base model."""
    candidates = [recorded, f"{prefix}.{recorded}", recorded.removeprefix(prefix + ".")]
    return next((name for name in candidates if name in modules), None)


def packed_like(module: nn.Module, spec: QuantSpec) -> PackedWeight:
    """An empty packed layer on the meta device that takes the place of a dense one."""
    weight: Any = module.weight
    rows, columns = weight.shape
    if isinstance(module, nn.Embedding):
        return QuantEmbedding(rows, columns, module.padding_idx, spec=spec, device="meta", dtype=weight.dtype)
    if is_transposed(module):
        rows, columns = columns, rows
    layer = QuantLinear(columns, rows, module.bias is not None, spec=spec, device="meta", dtype=weight.dtype)
    layer.was_conv1d = is_transposed(module)
    return layer


def place_packed(model: nn.Module, specs: Mapping[str, QuantSpec]) -> None:
    """Put empty packed layers on the meta device in place of dense ones, and of the modules that hold packed experts."""
    experts: dict[str, dict[str, QuantSpec]] = {}
    from loftq.hub.adapter import know_experts

    know_experts(model)
    for name, spec in specs.items():
        owner, _, leaf = name.rpartition(".")
        if is_fused_experts(model.get_submodule(owner)):
            experts.setdefault(owner, {})[leaf] = spec
        else:
            replace_module(model, name, packed_like(model.get_submodule(name), spec))
    for owner, of_parameters in experts.items():
        replace_module(model, owner, QuantExperts(model.get_submodule(owner), of_parameters))


def mark_packed(model: nn.Module, quantization_config: LoftQQuantizationConfig) -> None:
    """Give a model that was packed in memory what transformers gives one that it has loaded packed: Trainer asks for it."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return
    quantizer = LoftQHfQuantizer(quantization_config)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = quantization_config.quant_method
    model._weight_conversions = []  # those of the dense file; a packed one has the model's names
    quantizer.postprocess_model(model)


def save_experts_whole(model: nn.Module) -> None:
    """Keep transformers from taking packed experts apart when it saves the model, as it does with dense ones."""
    if any(isinstance(module, QuantExperts) for module in model.modules()):
        model._weight_conversions = []  # type: ignore[assignment]


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` where ``name`` is."""
    parent, _, child = name.rpartition(".")
    new.train(model.get_submodule(name).training)
    new.requires_grad_(False)
    setattr(model.get_submodule(parent), child, new)


def present_for_dtype_checks(model: nn.Module) -> None:
    """T5's family casts activations to the dtype of the modules it wants in float32; see ``present_as_int8``."""
    names = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    names |= {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear) and names.intersection(name.split(".")):
            module.present_as_int8()


def dequantize_modules(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every packed layer by a dense one, in place; what was a ``Conv1D`` until :func:`restore_conv1d`."""
    packed = [(n, m) for n, m in model.named_modules() if isinstance(m, PackedModule)]
    if any(isinstance(m, QuantExperts) for _, m in packed):  # see save_experts_whole
        for owner in model.modules():
            owner.__dict__.pop("_weight_conversions", None)
    for name, module in packed:
        if isinstance(module, QuantExperts):
            replace_module(model, name, module.to_dense(dtype or torch.float32))
            continue
        assert isinstance(module, PackedWeight)
        weight = module.dequantize(dtype or torch.float32)
        if isinstance(module, QuantEmbedding):
            dense: nn.Module = nn.Embedding.from_pretrained(weight, padding_idx=module.padding_idx)
        else:
            assert isinstance(module, QuantLinear)
            dense = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            dense.weight = nn.Parameter(weight, requires_grad=False)
            dense.bias = module.bias
            dense.was_conv1d = module.was_conv1d  # type: ignore[assignment]
        replace_module(model, name, dense)
    return model


def restore_conv1d(model: nn.Module) -> nn.Module:
    """Replace the linear layers that stand for a ``Conv1D`` by one, in place: adapters have been merged by now."""
    from transformers.pytorch_utils import Conv1D

    for name, module in [(n, m) for n, m in model.named_modules() if getattr(m, "was_conv1d", False)]:
        assert isinstance(module, nn.Linear)
        with torch.device("meta"):
            dense = Conv1D(module.out_features, module.in_features)
        dense.weight = nn.Parameter(module.weight.detach().T.contiguous(), requires_grad=False)
        dense.bias = module.bias
        replace_module(model, name, dense)
    return model
