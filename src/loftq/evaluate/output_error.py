"""How far the stored weights of a quantized folder are from the source's, in weights and in layer outputs.

    E = W - Q - scaling · B A
    weight error = ‖E‖_F / ‖W‖_F
    output error = ‖E H^½‖_F / ‖W H^½‖_F = sqrt(tr(E H Eᵀ) / tr(W H Wᵀ)),  H = E[x xᵀ] over a calibration text

The output error is the root mean square of E x over that of W x for the layer's inputs x. Both are computed from the bytes
on disk, so they hold for whatever method wrote the folder. Products are float32, sums float64; one module is in memory at
a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from loftq.checkpoint.assembly import Parameters
from loftq.checkpoint.naming import meta_model
from loftq.checkpoint.source import SafetensorsSource, Source, open_source
from loftq.codec.qtensor import QuantizedTensor, storage_layout
from loftq.config import LoftQConfig
from loftq.errors import SourceError, WeightError
from loftq.hub.adapter import ADAPTER_WEIGHTS, INIT_DIR, matrix_factors, tensor_names
from loftq.hub.backbone import read_quantization_config
from loftq.modules.experts import stored_name
from loftq.plan.targets import ModulePlan, report_plans
from loftq.report.record import QuantizationReport
from loftq.solver import lora_scaling


class _HasSecondMoment(Protocol):
    @property
    def second_moment(self) -> Tensor: ...


@dataclass(frozen=True)
class ModuleError:
    """Relative errors of one module; ``output_error`` is ``None`` where there are no statistics of its inputs."""

    name: str
    weight_error: float
    output_error: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class FolderErrors:
    """The errors of every module, and their means over the modules."""

    modules: list[ModuleError]

    @property
    def weight_error(self) -> float:
        return sum(m.weight_error for m in self.modules) / len(self.modules)

    @property
    def output_error(self) -> float | None:
        """Over the modules that have one; ``None`` without any."""
        known = [m.output_error for m in self.modules if m.output_error is not None]
        return sum(known) / len(known) if known else None


class ErrorMeter:
    """Measures quantized folders of one source against the same statistics.

    Args:
        source: the full-precision checkpoint.
        statistics: module name -> an object with ``second_moment``, H (in, in) or its diagonal (in,). Modules that it
            lacks, and embeddings, whose inputs are no vectors, get no output error.
    """

    def __init__(self, source: str | Path | Source, statistics: Mapping[str, _HasSecondMoment] | None = None) -> None:
        self.source = open_source(source) if isinstance(source, (str, Path)) else source
        self.statistics = statistics or {}
        self._parameters = Parameters(self.source, meta_model(self.source.config()))
        self._energy: dict[str, float] = {}  # tr(W H Wᵀ) by module: the same for every folder

    def measure(self, folder: str | Path, *, use_adapter: bool = True) -> FolderErrors:
        """The errors of a folder that ``loftq quantize`` has written.

        Args:
            folder: its name. use_adapter: with the fitted adapter, or of the backbone alone.

        Raises:
            SourceError: if the folder is none, is damaged, or is of another source.
        """
        return FolderErrors([self._module(*item) for item in self.residuals(folder, use_adapter=use_adapter)])

    def residuals(self, folder: str | Path, *, use_adapter: bool = True) -> Iterator[tuple[ModulePlan, Tensor, Tensor]]:
        """(plan, W, E) of every matrix, one at a time: (out, in) float32 each. Arguments and errors as :meth:`measure`.

        Experts are a matrix each, named as :meth:`ModulePlan.matrices` names them.
        """
        for module, expert, plan, stored in self._matrices(Path(folder), use_adapter):
            weight = self._weight(module, expert, plan)
            yield plan, weight, stored.neg_().add_(weight)

    def _module(self, plan: ModulePlan, weight: Tensor, error: Tensor) -> ModuleError:
        relative = _ratio(_squares(error), _squares(weight))
        statistics = self.statistics.get(plan.name) if plan.kind != "embedding" else None
        if statistics is None:
            return ModuleError(plan.name, relative, None)
        moment = statistics.second_moment.float()
        if plan.name not in self._energy:
            self._energy[plan.name] = energy(weight, moment)
        return ModuleError(plan.name, relative, _ratio(energy(error, moment), self._energy[plan.name]))

    def _weight(self, module: ModulePlan, expert: int | None, plan: ModulePlan) -> Tensor:
        if not self._parameters.parts(module.parameter):
            raise SourceError(f"{self.source.path} has no weight of {plan.name}, expected the source of the folder")
        weight = self._parameters.read(module.parameter, expert, module.experts).float()
        weight = weight.T if plan.kind == "conv1d" else weight
        if tuple(weight.shape) != plan.shape:
            raise SourceError(
                f"{plan.name} is {tuple(weight.shape)} in {self.source.path} and {plan.shape} in the folder; compare a "
                f"folder with its own source"
            )
        return weight

    def _matrices(self, folder: Path, use_adapter: bool) -> Iterator[tuple[ModulePlan, int | None, ModulePlan, Tensor]]:
        from loftq.hub.quantizer import LoftQQuantizationConfig

        report = QuantizationReport.load(folder)
        specs = LoftQQuantizationConfig(**read_quantization_config(folder)).module_specs()
        config = LoftQConfig.from_dict(report.config)
        packed = SafetensorsSource(folder)
        adapter = SafetensorsSource(folder / INIT_DIR, single=ADAPTER_WEIGHTS) if use_adapter else None
        missing = [record.name for record in report.modules if record.name not in specs]
        if missing:
            raise SourceError(f"{folder}'s config.json does not say how {missing[0]} is stored; quantize again")
        for module in report_plans(report, specs).values():
            scaling = lora_scaling(config.lora_alpha, module.rank, config.use_rslora)
            factors = None if adapter is None else _factors(adapter, module)
            for number, plan in enumerate(module.matrices()):
                expert = number if module.experts else None
                names = {n: stored_name(module.parameter, n) for n in storage_layout(plan.spec, plan.shape)}
                own = {n: packed.read(name, expert) for n, name in names.items() if name in packed.tensors}
                try:
                    stored = QuantizedTensor(own, plan.spec, plan.shape).dequantize()
                except WeightError as error:
                    raise SourceError(f"{folder} does not hold {plan.name} ({error}); quantize again") from None
                if factors is not None:
                    lora_A, lora_B = factors[number]
                    delta = lora_B @ lora_A
                    stored += scaling * (delta.T if plan.kind == "embedding" else delta)
                yield module, expert, plan, stored


def _factors(adapter: SafetensorsSource, plan: ModulePlan) -> list[tuple[Tensor, Tensor]]:
    """A and B of each of the module's matrices."""
    name_A, name_B = tensor_names(plan)
    if name_A not in adapter.tensors or name_B not in adapter.tensors:
        raise SourceError(f"{adapter.path} has no {name_A} and {name_B}, expected the fitted adapter; quantize again")
    return matrix_factors(plan, adapter.read(name_A).float(), adapter.read(name_B).float())


def energy(matrix: Tensor, moment: Tensor) -> float:
    """tr(M H Mᵀ) for M (out, in) float32 and H (in, in) or its diagonal (in,)."""
    product = matrix * moment if moment.dim() == 1 else matrix @ moment
    return float(product.mul_(matrix).sum(dtype=torch.float64))


def _squares(matrix: Tensor) -> float:
    return float(matrix.square().sum(dtype=torch.float64))


def _ratio(error: float, whole: float) -> float:
    # rounding can take a vanishing trace below 0; a layer that computes 0 has error 0 only if nothing was added to it
    return math.sqrt(max(error, 0.0) / whole) if whole > 0 else (0.0 if error <= 0 else math.inf)


def output_errors(
    folder: str | Path,
    source: str | Path | Source,
    statistics: Mapping[str, _HasSecondMoment] | None = None,
    *,
    use_adapter: bool = True,
) -> FolderErrors:
    """Weight and output error of every module of a quantized folder; see :class:`ErrorMeter`."""
    return ErrorMeter(source, statistics).measure(folder, use_adapter=use_adapter)
