"""The pieces of work that quantizing a checkpoint consists of: one module, or one tensor that passes through.

A module has one matrix, or one for each expert; these are decomposed one after the other and stored in one tensor.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loftq.checkpoint.assembly import Parameters
from loftq.checkpoint.naming import missing_parameters
from loftq.checkpoint.source import SINGLE, Source
from loftq.codec import QuantizedTensor
from loftq.codec.blockwise import all_finite
from loftq.codec.qtensor import TensorInfo
from loftq.config import LoftQConfig
from loftq.errors import ConfigError, SourceError, WeightError
from loftq.hub import adapter as adapters
from loftq.modules.experts import stored_name
from loftq.parallel import run_side_by_side
from loftq.plan.targets import ModulePlan
from loftq.report.record import ModuleRecord
from loftq.solver import Decomposition, decompose, lora_scaling
from loftq.solver.importance import InputStatistics

Known = InputStatistics | Sequence[InputStatistics] | None
"""What is known of a module's inputs: for experts, of each expert's."""


def largest_factor(known: Known) -> int:
    """Elements of the largest matrix of the statistics that a decomposition may factor."""
    each = known if isinstance(known, Sequence) else [known]
    return max((0 if statistics is None else statistics.factored for statistics in each), default=0)


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


def decompose_matrices(
    matrices: Sequence[Callable[[], Tensor]],
    plan: ModulePlan,
    config: LoftQConfig,
    statistics: Known = None,
    device: torch.device | None = None,
) -> tuple[list[Decomposition], list[float]]:
    """The decomposition of each of a module's matrices, and the matrices' Frobenius norms.

    Small ones are decomposed side by side, as small modules are; on a GPU one after the other. Each has a seed of its own.

    Args:
        matrices: read them, as the source stores them. statistics: of all of them, or one for each. device: where to
            compute, by default where they are.
    """
    known = statistics if isinstance(statistics, Sequence) else [statistics] * len(matrices)
    jobs = zip(matrices, plan.matrices(), known, strict=True)

    def job(
        read: Callable[[], Tensor], part: ModulePlan, of_part: InputStatistics | None
    ) -> tuple[Decomposition, float]:
        weight = read() if device is None else read().to(device)
        norm = float(torch.linalg.vector_norm(weight, dtype=torch.float64)) if plan.experts else 1.0
        return decompose_module(weight, part, config, of_part), norm

    if not plan.experts:
        found = [job(*each) for each in jobs]
    else:
        size = plan.shape[0] * plan.shape[1]
        sized = ((max(size, largest_factor(each[2])), partial(job, *each)) for each in jobs)
        found = [result for _, (result, _) in run_side_by_side(sized, lambda size: size, device)]
    return [result for result, _ in found], [norm for _, norm in found]


def joined_tensors(plan: ModulePlan, results: Sequence[Decomposition]) -> dict[str, Tensor]:
    """The tensors that a module is stored in, its adapter's among them, by name."""
    stored = [result.quantized.tensors for result in results]
    tensors = {
        stored_name(plan.parameter, name): torch.stack([each[name] for each in stored])
        if plan.experts
        else stored[0][name]
        for name in stored[0]
    }
    return {**tensors, **adapter_state(plan, results)}


def adapter_state(plan: ModulePlan, results: Sequence[Decomposition]) -> dict[str, Tensor]:
    """A and B of a module's matrices under PEFT's names."""
    factors = [(result.lora_A, result.lora_B) for result in results]
    return adapters.adapter_tensors(plan, *(adapters.join_experts(factors) if plan.experts else factors[0]))


def module_record(
    plan: ModulePlan, results: Sequence[Decomposition], norms: Sequence[float], statistics: Known = None
) -> ModuleRecord:
    """What the report says of one module. Errors of several experts are those of all their weights together."""
    known = list(statistics) if isinstance(statistics, Sequence) else [statistics] * len(results)
    total = math.fsum(norm**2 for norm in norms)

    def together(values: Sequence[float]) -> float:
        if len(values) == 1 or not total:
            return values[0]
        return math.sqrt(math.fsum((value * norm) ** 2 for value, norm in zip(values, norms, strict=True)) / total)

    steps = max(len(result.errors) for result in results)
    errors = [together([r.errors[min(k, len(r.errors) - 1)] for r in results]) for k in range(steps)]
    tokens = [0 if s is None else s.tokens for s in known]
    each = [
        {
            "error": result.error,
            "quantization_error": result.errors[0],
            "best_iter": result.best_iter,
            "method": result.method,
            "objective": result.objective,
            "calibration_tokens": seen,
        }
        for result, seen in zip(results, tokens, strict=True)
    ]
    return ModuleRecord(
        name=plan.name,
        kind=plan.kind,
        shape=list(plan.full_shape),
        bits=plan.spec.bits,
        codebook=plan.spec.codebook,
        block_size=plan.spec.block_size,
        rank=plan.rank,
        numel=plan.numel,
        weight_bytes=sum(result.quantized.nbytes for result in results),
        adapter_bytes=sum(4 * (result.lora_A.numel() + result.lora_B.numel()) for result in results),
        quantization_error=errors[0],
        error=together([result.error for result in results]),
        errors=errors,
        best_iter=_commonest([result.best_iter for result in results]),
        method=_commonest([result.method for result in results]),
        objective=together([result.objective for result in results]),
        calibration_tokens=max(tokens),
        experts=each if plan.experts else None,
    )


def _commonest(values: Sequence[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


class Unit:
    """One piece of work: a module to quantize, or a tensor to pass through."""

    def __init__(
        self, source_name: str, info: TensorInfo, plan: ModulePlan | None, output_name: str, known: bool
    ) -> None:
        self.known = known
        self.name = plan.name if plan is not None else source_name
        self.source_name = source_name
        self.plan = plan
        self.weights = max(1, info.nbytes // info.dtype.itemsize) if plan is None else plan.numel
        self.nbytes = info.nbytes
        self.backbone: dict[str, TensorInfo] = {output_name: info} if plan is None else plan.storage()

    @property
    def outputs(self) -> list[str]:
        """Names of the tensors it writes."""
        adapter = () if self.plan is None else adapters.tensor_names(self.plan)
        return [*self.backbone, *adapter]

    @property
    def experts(self) -> bool:
        """Whether it has a matrix for each expert."""
        return self.plan is not None and self.plan.experts > 0

    def matrices(self, source: Source, parameters: Parameters | None = None) -> list[Callable[[], Tensor]]:
        """Give what :meth:`compute` takes: a tensor that is read now, or experts that are read one by one.

        Args:
            parameters: of the same source; needed for experts.
        """
        plan = self.plan
        if plan is None or not plan.experts:
            return [partial(_same, source.read(self.source_name))]
        assert parameters is not None
        return [partial(parameters.read, plan.parameter, e, plan.experts) for e in range(plan.experts)]

    def compute(
        self,
        matrices: Sequence[Callable[[], Tensor]],
        config: LoftQConfig,
        statistics: Known = None,
        device: torch.device | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The unit's tensors under their output names, on the CPU, and its record, from the tensor as it was read."""
        if self.plan is None:
            tensor = matrices[0]()
            # a tensor that the model does not know may be a mask with -inf
            if self.known and tensor.is_floating_point() and not all_finite(tensor):
                raise WeightError(
                    f"{self.source_name} has NaN or infinite elements, expected finite numbers; check the source checkpoint"
                )
            return {next(iter(self.backbone)): tensor}, {}
        results, norms = decompose_matrices(matrices, self.plan, config, statistics, device)
        tensors = {name: tensor.cpu() for name, tensor in joined_tensors(self.plan, results).items()}
        return tensors, vars(module_record(self.plan, results, norms, statistics))

    def dense(self, tensors: Mapping[str, Tensor], config: LoftQConfig) -> Tensor:
        """Q + scaling * B A as the source stores the weight, from the tensors that :meth:`compute` gave."""
        assert self.plan is not None
        prefix = self.plan.parameter.removesuffix("weight")
        quantized = QuantizedTensor.from_state_dict(tensors, self.plan.spec, self.plan.shape, prefix)
        name_A, name_B = adapters.tensor_names(self.plan)
        scaling = lora_scaling(config.lora_alpha, self.plan.rank, config.use_rslora)
        dense = torch.addmm(quantized.dequantize(), tensors[name_B], tensors[name_A], alpha=scaling)
        return dense.T if self.plan.kind == "conv1d" else dense


def _same(tensor: Tensor) -> Tensor:
    return tensor


def make_units(source: Source, model: nn.Module, plans: Mapping[str, ModulePlan], parameters: Parameters) -> list[Unit]:
    names = parameters.names
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = {plan.parameter: plan for plan in plans.values()}
    assembled = {part: name for name in weights for part in parameters.parts(name) if part not in names}
    units = []
    for source_name, info in source.tensors.items():
        output_name = names.get(source_name, assembled.get(source_name, source_name))
        plan = weights.pop(output_name, None)
        if source_name in assembled:
            if plan is not None:  # the first of its parts
                _check_parts(source, parameters, plan)
                info = TensorInfo(info.dtype, shapes[output_name])
                units.append(Unit(source_name, info, plan, output_name, True))
            continue
        expected = shapes.get(output_name, info.shape)
        if info.shape != expected:
            raise SourceError(
                f"{source_name} has shape {info.shape}, expected {expected} as config.json says; fetch the checkpoint again"
            )
        if plan is not None:
            _check_dtype(source_name, info)
        units.append(Unit(source_name, info, plan, output_name, source_name in names))
    missing = [*weights, *sorted(missing_parameters(model, names, source.tensors) - weights.keys())]
    if missing:
        raise SourceError(
            f"the checkpoint lacks {missing[0]} (and {len(missing) - 1} more) of {type(model).__name__}'s weights; fetch it "
            f"again, or name the right architecture in config.json"
        )
    return units


def _check_dtype(name: str, info: TensorInfo) -> None:
    if info.dtype.itemsize < 2 or not info.dtype.is_floating_point:
        raise SourceError(
            f"{name} is {info.dtype}, expected floating point of 16 bits or more; start from a full-precision checkpoint"
        )


def _check_parts(source: Source, parameters: Parameters, plan: ModulePlan) -> None:
    """Refuse tensors that cannot make up all experts, before hours of work."""
    parts = parameters.parts(plan.parameter)
    for name in parts:
        _check_dtype(name, source.tensors[name])
    weights = sum(math.prod(source.tensors[name].shape) for name in parts)
    if weights != plan.numel:
        raise SourceError(
            f"the {len(parts)} tensors of {plan.name} have {weights:,} weights, expected {plan.numel:,} of {plan.experts} "
            f"experts as config.json says; fetch the checkpoint again"
        )


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
