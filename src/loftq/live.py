"""A model in memory: quantized in place, and saved as the folder that ``loftq quantize`` would have written."""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from loftq.checkpoint.writer import Staging, check_target, disk_errors
from loftq.codec import QuantizedTensor
from loftq.codec.blockwise import check_weight
from loftq.codec.qtensor import TensorInfo
from loftq.config import LoftQConfig
from loftq.errors import ConfigError, WeightError
from loftq.hub import adapter as adapters
from loftq.hub.backbone import backbone_tensors, tensors_sha256, unsaved_base
from loftq.modules import QuantEmbedding, QuantExperts, QuantLinear
from loftq.pipeline import MAX_SHARD_BYTES, Progress, digest_of, reporter, write_metadata
from loftq.plan.targets import ModulePlan, plan_modules, report_plans
from loftq.report.record import QuantizationReport
from loftq.report.system import PeakMemory, versions
from loftq.units import Unit, adapter_state, decompose_matrices, layout, module_record

if TYPE_CHECKING:
    from peft import PeftModel

    from loftq.calibrate.statistics import Statistics

ADAPTER = "default"
"""PEFT's name of the fitted adapter."""


def quantize_model(
    model: nn.Module,
    config: LoftQConfig,
    *,
    statistics: Statistics | None = None,
    progress: bool | Progress = True,
) -> PeftModel:
    """Quantize a live transformers model in place and wrap it with its fitted adapter.

    Every selected layer is replaced by a packed one, one at a time, on the device where it is; the dense weight is freed
    as its layer goes. The adapter is trainable. The result is what ``load(folder, trainable=True)`` gives, without a folder:
    :func:`save` writes one. Its :class:`QuantizationReport` is its attribute ``loftq_report``. Its adapter does not name the
    model that was quantized as its base, so that PEFT cannot put it on the dense weights.

    Args:
        model: a transformers model (any ``nn.Module`` that PEFT accepts).
        config: what to do. Its calibration text is not read, since a live model has no tokenizer.
        statistics: of the layers' inputs, from :func:`loftq.calibrate.collect_from_model`; without them, and for layers
            that they leave out, only the weight error counts.
        progress: as for :func:`quantize_checkpoint`.

    Raises:
        ConfigError, WeightError: see :func:`quantize_checkpoint`. All weights are checked first.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    from loftq.hub.quantizer import LoftQQuantizationConfig, mark_packed, replace_module

    plans = plan_modules(model, config)
    for plan in plans.values():
        try:
            for matrix in _matrices(model, plan):
                check_weight(matrix())
        except WeightError as error:  # before anything is replaced
            raise WeightError(f"{plan.name}: {error}") from None
    lora = adapters.lora_config(plans, model, config)
    adapters.know_experts(model)
    state: dict[str, Tensor] = {}
    experts: dict[str, dict[str, list[QuantizedTensor]]] = {}
    records = []
    seconds: dict[str, float] = {}
    memory = PeakMemory().start()
    started = time.perf_counter()
    with reporter(progress, {name: plan.numel for name, plan in plans.items()}) as advance:
        for name, plan in plans.items():
            begun = time.perf_counter()
            known = statistics.of_module(plan) if statistics is not None else None
            results, norms = decompose_matrices(_matrices(model, plan), plan, config, known)
            records.append(module_record(plan, results, norms, known))
            state.update(adapter_state(plan, results))
            if plan.experts:
                owner, _, leaf = name.rpartition(".")
                experts.setdefault(owner, {})[leaf] = [result.quantized for result in results]
                if not plan.nested:  # the last parameter of its module
                    dense = model.get_submodule(owner)
                    replace_module(model, owner, QuantExperts.from_quantized(dense, experts.pop(owner)))
            else:
                replace_module(model, name, _packed(model.get_submodule(name), results[0].quantized, plan))
            seconds[name] = round(time.perf_counter() - begun, 4)
            advance(name, plan.numel)
    specs = {name: plan.spec for name, plan in plans.items()}
    mark_packed(model, LoftQQuantizationConfig.for_specs(config.spec, specs))
    tensors = backbone_tensors(model)
    packed = {name for plan in plans.values() for name in plan.storage()}
    report = QuantizationReport(
        modules=records,
        other_bytes=sum(t.nbytes for name, t in tensors.items() if name not in packed),
        config={**config.to_dict(), "method": config.method or _commonest(record.method for record in records)},
        source={"name": getattr(model, "name_or_path", None) or None, "sha256": {}},
        backbone_sha256=tensors_sha256(tensors),
        adapter_sha256=tensors_sha256(state),
        versions=versions(),
        calibration=(statistics.summary or None) if statistics is not None else None,
        timing={
            "seconds": round(time.perf_counter() - started, 3),
            "peak_memory_bytes": memory.peak(),
            "modules": seconds,
        },
    )
    lora.inference_mode = False
    _name_base(model, lora, unsaved_base(report.backbone_sha256), report.backbone_sha256)
    peft_model = get_peft_model(model, lora)
    set_peft_model_state_dict(peft_model, state)
    peft_model.loftq_report = report
    return peft_model


def save(model: PeftModel, out_dir: str | Path) -> QuantizationReport:
    """Write what :func:`quantize_model` gave, trained since or not, as a folder like those of :func:`quantize_checkpoint`.

    The backbone is written with its hash, and as the fitted adapter, in ``loftq_init``, the one that the model has now.
    :func:`load` gives a model with the same outputs. Adapters that the model saves afterwards name the folder as their base.
    The tokenizer is not the model's: save it to the folder after this.

    The report, which is in the folder, is returned. Its errors are those of the fit, whatever has been trained since. The
    hashes of the source's files are not known.

    Args:
        model: from :func:`quantize_model`.
        out_dir: created; must be absent or empty. It appears complete or not at all.

    Raises:
        ConfigError: ``quantize_model`` did not return the model, its adapter is gone, or no transformers class would load it.
        OutputError: the folder holds something else, or cannot be written.
    """
    from peft import get_peft_model_state_dict

    out_dir = Path(os.path.abspath(os.path.expanduser(out_dir)))  # by which its adapters find it from anywhere
    report = getattr(model, "loftq_report", None)
    if not isinstance(report, QuantizationReport):
        raise ConfigError(
            f"the model is a {type(model).__name__} that loftq.quantize_model has not returned, expected one that it has; save "
            f"the adapter of a model that was loaded with save_pretrained"
        )
    base: Any = model.get_base_model()
    if not hasattr(base, "hf_quantizer"):
        raise ConfigError(
            f"the model is a {type(base).__name__}, expected a class of transformers, which alone can load it"
        )
    with disk_errors(out_dir):
        check_target(out_dir)
    plans = report_plans(report, base.config.quantization_config.module_specs())
    tensors = backbone_tensors(base)
    units = _units(tensors, plans)
    files, index = layout(units, plans, MAX_SHARD_BYTES)
    adapter = {}
    if ADAPTER in model.peft_config:
        found = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
        adapter = {name: tensor.detach().float() for name, tensor in found.items()}
    expected = files[f"{adapters.INIT_DIR}/{adapters.ADAPTER_WEIGHTS}"]
    if {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in adapter.items()} != expected:
        raise ConfigError(
            f"the model's adapter {ADAPTER!r} has {len(adapter)} tensors, expected the {len(expected)} that "
            f"loftq.quantize_model gave it; save before it is removed or replaced"
        )
    stored = {**tensors, **adapter}
    # a killed save is begun anew under the same name, and no other's unfinished work is removed
    staging = Staging(out_dir, {"saved": report.config}, files, resume=True)
    try:
        for unit in units:
            names = [*unit.backbone, *(adapters.tensor_names(unit.plan) if unit.plan else ())]
            staging.write_unit(unit.name, {index[n]: stored[n] for n in names}, {})
        report = dataclasses.replace(
            report,
            other_bytes=sum(unit.nbytes for unit in units if unit.plan is None),
            backbone_sha256=digest_of(staging.digests(), adapter=False),
            adapter_sha256=digest_of(staging.digests(), adapter=True),
        )
        lora: Any = copy.deepcopy(model.peft_config[ADAPTER])
        lora.inference_mode, lora.base_model_name_or_path = True, str(out_dir)
        with disk_errors(out_dir):
            if base.can_generate():
                base.generation_config.save_pretrained(staging.path)
            write_metadata(staging.path, base, _stored_config(base, tensors, plans), lora, report, index)
        staging.finish()
    finally:
        staging.close()
    _name_base(base, model.peft_config[ADAPTER], str(out_dir), report.backbone_sha256)
    model.loftq_report = report
    return report


def _name_base(model: nn.Module, lora: Any, base: str, backbone_sha256: str) -> None:
    """Let the adapter say what it belongs to, and every adapter that PEFT puts on the model after it."""
    lora.base_model_name_or_path = base
    lora.auto_mapping = adapters.auto_mapping(model, backbone_sha256)
    model.name_or_path = base  # type: ignore[assignment]


def _units(tensors: Mapping[str, Tensor], plans: Mapping[str, ModulePlan]) -> list[Unit]:
    """What is written, in the model's order: every packed module whole, and every other tensor."""
    plan_of = {stored: plan for plan in plans.values() for stored in plan.storage()}
    units: dict[str, Unit] = {}
    for name, tensor in tensors.items():
        plan = plan_of.get(name)
        unit = plan.name if plan is not None else name
        if unit not in units:
            units[unit] = Unit(name, TensorInfo(tensor.dtype, tuple(tensor.shape)), plan, name, True)
    return list(units.values())


def _stored_config(base: Any, tensors: Mapping[str, Tensor], plans: Mapping[str, ModulePlan]) -> Any:
    """The model's config as the folder has it: with the class to load, and the dtype of what is not packed."""
    config = copy.deepcopy(base.config)
    config.architectures = [type(base).__name__]
    packed = {name for plan in plans.values() for name in plan.storage()}
    dtypes = [t.dtype for name, t in tensors.items() if name not in packed and t.is_floating_point()]
    if dtypes:
        config.dtype = str(dtypes[0]).removeprefix("torch.")
    return config


def _commonest(methods: Iterable[str]) -> str:
    return Counter(methods).most_common(1)[0][0]


def _matrices(model: nn.Module, plan: ModulePlan) -> list[Callable[[], Tensor]]:
    """Give the weight of a module, or of each expert, as the module holds it."""
    owner, _, leaf = plan.parameter.rpartition(".")
    weight: Tensor = getattr(model.get_submodule(owner), leaf).detach()
    return [partial(weight.__getitem__, e) for e in range(plan.experts)] if plan.experts else [lambda: weight]


def _packed(module: nn.Module, quantized: QuantizedTensor, plan: ModulePlan) -> nn.Module:
    """The packed layer that takes the place of a dense one."""
    if isinstance(module, nn.Embedding):
        dtype = module.weight.dtype
        return QuantEmbedding.from_quantized(quantized, padding_idx=module.padding_idx, dtype=dtype)
    packed = QuantLinear.from_quantized(quantized, module.bias)  # type: ignore[arg-type]
    packed.was_conv1d = plan.kind == "conv1d"
    return packed
