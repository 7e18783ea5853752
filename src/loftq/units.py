"""The pieces of work that quantizing a checkpoint consists of: one module, or one tensor that passes through."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loftq.checkpoint.naming import missing_parameters, model_names
from loftq.checkpoint.source import SINGLE, Source
from loftq.codec import QuantizedTensor
from loftq.codec.blockwise import all_finite
from loftq.codec.qtensor import TensorInfo, storage_layout
from loftq.config import LoftQConfig
from loftq.errors import ConfigError, SourceError, WeightError
from loftq.hub import adapter as adapters
from loftq.plan.targets import ModulePlan
from loftq.report.record import ModuleRecord
from loftq.solver import Decomposition, decompose, lora_scaling
from loftq.solver.importance import InputStatistics


def module_seed(seed: int, name: str) -> int:
    """A module's own seed: the same whatever else is quantized, and in whatever order."""
    return zlib.crc32(f"{seed}:{name}".encode())


def decompose_module(
    weight: Tensor, plan: ModulePlan, config: LoftQConfig, statistics: InputStatistics | None = None
) -> Decomposition:
    """:func:`loftq.decompose` with a module's settings; errors name the module."""
    try:
        return decompose(
            weight.T if plan.kind == "conv1d" else weight,
            plan.spec,
            rank=plan.rank,
            num_iter=config.num_iter,
            method=config.method,
            importance=statistics,
            damping=config.damping,
            lora_alpha=config.lora_alpha,
            use_rslora=config.use_rslora,
            svd=config.svd,
            seed=module_seed(config.seed, plan.name),
        )
    except (WeightError, ConfigError) as error:
        raise type(error)(f"{plan.name}: {error}") from None


def module_record(plan: ModulePlan, result: Decomposition, statistics: InputStatistics | None = None) -> ModuleRecord:
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
        method=result.method,
        objective=result.objective,
        calibration_tokens=0 if statistics is None else statistics.tokens,
    )


class Unit:
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

    @property
    def outputs(self) -> list[str]:
        """Names of the tensors it writes."""
        adapter = () if self.plan is None else adapters.tensor_names(self.plan)
        return [*self.backbone, *adapter]

    def compute(
        self, tensor: Tensor, config: LoftQConfig, statistics: InputStatistics | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The unit's tensors under their output names, and its record, from the tensor as it was read."""
        if self.plan is None:
            # a tensor that the model does not know may be a mask with -inf
            if self.known and tensor.is_floating_point() and not all_finite(tensor):
                raise WeightError(
                    f"{self.source_name} has NaN or infinite elements, expected finite numbers; check the source checkpoint"
                )
            return {next(iter(self.backbone)): tensor}, {}
        result = decompose_module(tensor, self.plan, config, statistics)
        tensors = result.quantized.state_dict(self._prefix)
        tensors.update(adapters.adapter_tensors(self.plan, result.lora_A, result.lora_B))
        return tensors, vars(module_record(self.plan, result, statistics))

    def dense(self, tensors: Mapping[str, Tensor], config: LoftQConfig) -> Tensor:
        """Q + scaling * B A as the source stores the weight, from the tensors that :meth:`compute` gave."""
        assert self.plan is not None
        quantized = QuantizedTensor.from_state_dict(tensors, self.plan.spec, self.plan.shape, self._prefix)
        name_A, name_B = adapters.tensor_names(self.plan)
        scaling = lora_scaling(config.lora_alpha, self.plan.rank, config.use_rslora)
        dense = torch.addmm(quantized.dequantize(), tensors[name_B], tensors[name_A], alpha=scaling)
        return dense.T if self.plan.kind == "conv1d" else dense


def make_units(source: Source, model: nn.Module, plans: Mapping[str, ModulePlan]) -> list[Unit]:
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
        units.append(Unit(source_name, info, plan, output_name, source_name in names))
    missing = [*weights, *sorted(missing_parameters(model, names, source.tensors) - weights.keys())]
    if missing:
        raise SourceError(
            f"the checkpoint lacks {missing[0]} (and {len(missing) - 1} more) of {type(model).__name__}'s weights; fetch it "
            f"again, or name the right architecture in config.json"
        )
    return units


def layout(
    units: list[Unit], plans: Mapping[str, ModulePlan], max_shard_bytes: int
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
