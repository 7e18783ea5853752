"""A whole model: from a source checkpoint to a finished folder, or in place for a live model."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from loftq.checkpoint.naming import meta_model, missing_parameters, model_names
from loftq.checkpoint.source import INDEX, SINGLE, Source, open_source, sha256_file
from loftq.checkpoint.writer import Staging, check_target, disk_errors, remove_leftovers
from loftq.codec.blockwise import check_weight
from loftq.codec.qtensor import TensorInfo, storage_layout
from loftq.config import LoftQConfig
from loftq.errors import OutputError, SourceError, WeightError
from loftq.hub import adapter as adapters
from loftq.modules import QuantEmbedding, QuantLinear
from loftq.parallel import run_side_by_side
from loftq.plan.targets import ModulePlan, plan_modules
from loftq.report.record import REPORT, ModuleRecord, QuantizationReport
from loftq.report.system import PeakMemory, versions
from loftq.solver import Decomposition, decompose

if TYPE_CHECKING:
    from peft import PeftModel

MAX_SHARD_BYTES = 50_000_000_000  # transformers' own default, so that saving a loaded model splits it alike


class Progress(Protocol):
    """Called with the number of weights done since the last call."""

    def __call__(self, name: str, weights: int) -> None: ...


def module_seed(seed: int, name: str) -> int:
    """A module's own seed: the same whatever else is quantized, and in whatever order."""
    return zlib.crc32(f"{seed}:{name}".encode())


def decompose_module(weight: Tensor, plan: ModulePlan, config: LoftQConfig) -> Decomposition:
    """:func:`loftq.decompose` with a module's settings; errors name the module."""
    try:
        return decompose(
            weight.T if plan.kind == "conv1d" else weight,
            plan.spec,
            rank=plan.rank,
            num_iter=config.num_iter,
            method=config.method,
            lora_alpha=config.lora_alpha,
            use_rslora=config.use_rslora,
            svd=config.svd,
            seed=module_seed(config.seed, plan.name),
        )
    except WeightError as error:
        raise WeightError(f"{plan.name}: {error}") from None


def module_record(plan: ModulePlan, result: Decomposition) -> ModuleRecord:
    """What the report says of one module."""
    return ModuleRecord(
        name=plan.name,
        kind=plan.kind,
        shape=list(plan.shape),
        bits=plan.spec.bits,
        codebook=plan.spec.codebook,
        block_size=plan.spec.block_size,
        rank=plan.rank,
        numel=plan.shape[0] * plan.shape[1],
        weight_bytes=result.quantized.nbytes,
        adapter_bytes=4 * (result.lora_A.numel() + result.lora_B.numel()),
        quantization_error=result.errors[0],
        error=result.error,
        errors=result.errors,
        best_iter=result.best_iter,
    )


def quantize_checkpoint(
    source: str | Path | Source,
    out_dir: str | Path,
    config: LoftQConfig,
    *,
    resume: bool = True,
    progress: bool | Progress = True,
    revision: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    command: str | None = None,
) -> QuantizationReport:
    """Turn a checkpoint into a folder with a packed backbone and a PEFT adapter, one tensor at a time.

    Args:
        source: folder with safetensors, ``.gguf`` file, or hub id.
        out_dir: created; must be absent or empty. It appears complete or not at all: until then everything is in
            ``OUT_DIR.incomplete`` beside it.
        config: what to do.
        resume: continue an interrupted run with the same settings; otherwise start over.
        progress: a bar on a terminal, nothing elsewhere; or a callable ``(name, weights)``.
        revision: of a hub id.
        max_shard_bytes: largest weight file.
        command: recorded in the report.

    Raises:
        SourceError, ConfigError, WeightError, OutputError: each with what was got, expected, and to be done.
    """
    out_dir = Path(os.path.expanduser(out_dir))
    with disk_errors(out_dir):  # before hours of work, and before the source is read
        finished = (out_dir / REPORT).exists()
        if not finished:
            check_target(out_dir)
    opened = open_source(source, revision) if isinstance(source, (str, Path)) else source
    model_config = opened.config()
    model = meta_model(model_config)
    plans = plan_modules(model, config)
    units = _units(opened, model, plans)
    hashes = {file.name: sha256_file(file) for file in opened.files}
    fingerprint = json.loads(json.dumps({"config": config.to_dict(), "source": hashes, "format": versions()["loftq"]}))

    files, index = _layout(units, plans, max_shard_bytes)
    if finished:
        report = QuantizationReport.load(out_dir)
        same = report.config == fingerprint["config"] and report.source["sha256"] == hashes
        if resume and same and all((out_dir / file).exists() for file in files):
            remove_leftovers(out_dir)
            return report
        raise OutputError(
            f"{out_dir} holds a finished quantization{'' if same else ' with other settings or of another source'}, which "
            f"is never overwritten; choose another folder or remove it"
        )

    staging = Staging(out_dir, fingerprint, files, resume)
    memory = PeakMemory().start()
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    try:
        with _reporter(progress, sum(u.weights for u in units)) as advance:
            for unit in units:
                if unit.name in staging.done:
                    advance(unit.name, unit.weights)
            todo = [unit for unit in units if unit.name not in staging.done]
            jobs = ((unit, partial(unit.compute, opened.read(unit.source_name), config)) for unit in todo)
            for unit, (result, took) in run_side_by_side(jobs, lambda unit: unit.weights):
                tensors, record = result
                staging.write_unit(unit.name, {index[n]: t for n, t in tensors.items()}, record)
                seconds[unit.name] = round(took, 4)
                advance(unit.name, unit.weights)
        records = [ModuleRecord(**staging.done[name]["record"]) for name in plans]
        report = QuantizationReport(
            modules=records,
            other_bytes=sum(u.nbytes for u in units if u.plan is None),
            config=fingerprint["config"],
            source={"name": str(opened.path), "sha256": hashes},
            backbone_sha256=_digest(staging.digests(), adapter=False),
            adapter_sha256=_digest(staging.digests(), adapter=True),
            versions=versions(),
            command=command,
            timing={
                "seconds": round(time.perf_counter() - started, 3),
                "peak_memory_bytes": memory.peak(),
                "modules": seconds,
            },
        )
        with disk_errors(out_dir):
            _write_metadata(staging.path, opened, model, model_config, plans, config, report, index, out_dir)
        staging.finish()
    finally:
        staging.close()
    return report


class _Unit:
    """One piece of work: a module to quantize, or a tensor to pass through."""

    def __init__(
        self, source_name: str, info: TensorInfo, plan: ModulePlan | None, output_name: str, known: bool
    ) -> None:
        self.known = known
        self.name = plan.name if plan is not None else source_name
        self.source_name = source_name
        self.plan = plan
        self.weights = max(1, info.nbytes // info.dtype.itemsize)
        self.nbytes = info.nbytes
        self.backbone: dict[str, TensorInfo] = {output_name: info}
        self._prefix = output_name.removesuffix("weight")
        if plan is not None:
            self.backbone = {self._prefix + n: i for n, i in storage_layout(plan.spec, plan.shape).items()}

    def compute(self, tensor: Tensor, config: LoftQConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The unit's tensors under their output names, and its record, from the tensor as it was read."""
        if self.plan is None:
            # a tensor that the model does not know may be a mask with -inf
            if self.known and tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                raise WeightError(
                    f"{self.source_name} has NaN or infinite elements, expected finite numbers; check the source checkpoint"
                )
            return {next(iter(self.backbone)): tensor}, {}
        result = decompose_module(tensor, self.plan, config)
        tensors = result.quantized.state_dict(self._prefix)
        tensors.update(adapters.adapter_tensors(self.plan, result.lora_A, result.lora_B))
        return tensors, vars(module_record(self.plan, result))


def _units(source: Source, model: nn.Module, plans: Mapping[str, ModulePlan]) -> list[_Unit]:
    names = model_names(model, source.tensors)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = {f"{name}.weight": plan for name, plan in plans.items()}
    units = []
    for source_name, info in source.tensors.items():
        output_name = names.get(source_name, source_name)
        plan = weights.pop(output_name, None)
        expected = shapes.get(output_name, info.shape)
        if info.shape != expected:
            raise SourceError(
                f"{source_name} has shape {info.shape}, expected {expected} as config.json says; fetch the checkpoint again"
            )
        if plan is not None and (info.dtype.itemsize < 2 or not info.dtype.is_floating_point):
            raise SourceError(
                f"{source_name} is {info.dtype}, expected floating point of 16 bits or more; start from a full-precision "
                f"checkpoint"
            )
        units.append(_Unit(source_name, info, plan, output_name, source_name in names))
    missing = [*weights, *sorted(missing_parameters(model, names, source.tensors) - weights.keys())]
    if missing:
        raise SourceError(
            f"the checkpoint lacks {missing[0]} (and {len(missing) - 1} more) of {type(model).__name__}'s weights; fetch it "
            f"again, or name the right architecture in config.json"
        )
    return units


def _layout(
    units: list[_Unit], plans: Mapping[str, ModulePlan], max_shard_bytes: int
) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, str]]:
    """Files with their tensors, and output tensor name -> ``file:name``."""
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for unit in units:
        nbytes = sum(info.nbytes for info in unit.backbone.values())
        if size and size + nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1].update(unit.backbone)
        size += nbytes
    width = len(shards)
    names = [SINGLE] if width == 1 else [f"model-{k + 1:05}-of-{width:05}.safetensors" for k in range(width)]
    files = dict(zip(names, shards, strict=True))
    adapter: dict[str, TensorInfo] = {}
    for plan in plans.values():
        adapter.update(adapters.tensor_layout(plan))
    files[f"{adapters.INIT_DIR}/{adapters.ADAPTER_WEIGHTS}"] = adapter
    return files, {name: f"{file}:{name}" for file, tensors in files.items() for name in tensors}


def _digest(digests: Mapping[str, str], *, adapter: bool) -> str:
    from loftq.hub.backbone import combine_digests

    named = {k.partition(":")[2]: d for k, d in digests.items() if k.startswith(adapters.INIT_DIR) is adapter}
    return combine_digests(named)


def _write_metadata(
    folder: Path,
    source: Source,
    model: nn.Module,
    model_config: Any,
    plans: Mapping[str, ModulePlan],
    config: LoftQConfig,
    report: QuantizationReport,
    index: Mapping[str, str],
    out_dir: Path,
) -> None:
    """Everything but the weights. The model's config comes last: without it the folder loads nowhere."""
    from loftq.hub.quantizer import LoftQQuantizationConfig

    (folder / "config.json").unlink(missing_ok=True)
    source.save_extras(folder)
    backbone = {n: key.partition(":")[0] for n, key in index.items() if not key.startswith(adapters.INIT_DIR)}
    if set(backbone.values()) != {SINGLE}:
        total = report.weight_bytes + report.other_bytes
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(backbone.items()))}, indent=2)
        (folder / INDEX).write_text(text + "\n", encoding="utf-8")
    lora = adapters.lora_config(plans, model, config, base=str(out_dir))
    adapters.save_adapter_config(lora, folder / adapters.INIT_DIR, model, report.backbone_sha256)
    report.save(folder)
    specs = {name: plan.spec for name, plan in plans.items()}
    model_config.quantization_config = LoftQQuantizationConfig.for_specs(config.spec, specs).to_dict()
    model_config.save_pretrained(folder)


def quantize_model(model: nn.Module, config: LoftQConfig, *, progress: bool | Progress = True) -> PeftModel:
    """Quantize a live transformers model in place and wrap it with its fitted adapter.

    Every selected layer is replaced by a packed one, one at a time, on the device where it is; the dense weight is freed
    as its layer goes. The adapter is trainable.

    Args:
        model: a transformers model (any ``nn.Module`` that PEFT accepts).
        config: what to do.
        progress: as for :func:`quantize_checkpoint`.

    Raises:
        ConfigError, WeightError: see :func:`quantize_checkpoint`. All weights are checked first.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    from loftq.hub.quantizer import LoftQQuantizationConfig, present_for_dtype_checks, replace_module

    plans = plan_modules(model, config)
    for name, plan in plans.items():
        try:
            check_weight(model.get_submodule(name).weight)  # type: ignore[arg-type]
        except WeightError as error:  # before anything is replaced
            raise WeightError(f"{plan.name}: {error}") from None
    lora = adapters.lora_config(plans, model, config)
    state: dict[str, Tensor] = {}
    with _reporter(progress, sum(p.shape[0] * p.shape[1] for p in plans.values())) as advance:
        for name, plan in plans.items():
            module = model.get_submodule(name)
            weight: Tensor = module.weight  # type: ignore[assignment]
            result = decompose_module(weight.detach(), plan, config)
            if isinstance(module, nn.Embedding):
                packed: nn.Module = QuantEmbedding.from_quantized(
                    result.quantized, padding_idx=module.padding_idx, dtype=weight.dtype
                )
            else:
                packed = QuantLinear.from_quantized(result.quantized, module.bias)  # type: ignore[arg-type]
                packed.was_conv1d = plan.kind == "conv1d"
            replace_module(model, name, packed)
            state.update(adapters.adapter_tensors(plan, result.lora_A, result.lora_B))
            del module, weight
            advance(name, plan.shape[0] * plan.shape[1])
    present_for_dtype_checks(model)
    if hasattr(model, "config"):
        specs = {name: plan.spec for name, plan in plans.items()}
        model.config.quantization_config = LoftQQuantizationConfig.for_specs(config.spec, specs)  # type: ignore[union-attr]
        model.is_quantized = True  # type: ignore[assignment]
        model.quantization_method = "loftq"  # type: ignore[assignment]
    lora.inference_mode = False
    peft_model = get_peft_model(model, lora)
    set_peft_model_state_dict(peft_model, state)
    return peft_model


@contextmanager
def _reporter(progress: bool | Progress, total: int) -> Iterator[Callable[[str, int], None]]:
    if callable(progress):
        yield progress
    elif progress:
        from loftq.report.progress import bar

        with bar(total) as advance:
            yield advance
    else:
        yield lambda name, weights: None
