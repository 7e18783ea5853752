"""What a quantization did, module by module: computed once, saved as ``loftq_report.json``, printed by ``inspect``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loftq.errors import SourceError

REPORT = "loftq_report.json"


@dataclass(frozen=True)
class ModuleRecord:
    """One quantized module.

    Attributes:
        name, kind, shape, bits, codebook, block_size, rank: what it is and how it is stored.
        numel: its weights. weight_bytes: codes, scales and codebook. adapter_bytes: A and B.
        quantization_error: relative Frobenius error |W - Q| / |W| of plain quantization.
        error: |W - Q - scaling * B A| / |W| of the result.
        errors, best_iter: the error after each step, and the step that was kept.
        method: what gave the result; for ``auto`` the candidate that won.
        objective: what the method minimised, relative: for data-aware methods the error of the layer's outputs.
        calibration_tokens: inputs of this layer that were seen; 0 where only the weight error counted.
        experts: of a parameter with experts, what holds for each of them: error, quantization_error, best_iter, method,
            objective, calibration_tokens. The fields above are then those of all their weights together, the commonest
            step and method, and the most inputs. ``None`` for other modules.
    """

    name: str
    kind: str
    shape: list[int]
    bits: int
    codebook: str
    block_size: int
    rank: int
    numel: int
    weight_bytes: int
    adapter_bytes: int
    quantization_error: float
    error: float
    errors: list[float]
    best_iter: int
    method: str = ""
    objective: float | None = None
    calibration_tokens: int = 0
    experts: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class QuantizationReport:
    """Totals and every module of one quantization.

    Attributes:
        modules: one record per quantized module.
        other_bytes: tensors that passed through unchanged.
        config: the :class:`loftq.LoftQConfig` as a dict.
        source: its name, and the sha256 of each of its files.
        backbone_sha256: identifies the quantized backbone; the adapter's config carries the same.
        adapter_sha256: identifies the fitted adapter.
        versions: of the packages that matter. command: the exact command, where there was one.
        calibration: the text that decided which errors matter: name, sha256, windows, tokens; ``None`` if there was none.
        timing: seconds in all and per module, peak memory. Apart from ``timing`` and ``command`` the report is the
            same however often a run was interrupted.
    """

    modules: list[ModuleRecord]
    other_bytes: int
    config: dict[str, Any]
    source: dict[str, Any]
    backbone_sha256: str
    adapter_sha256: str
    versions: dict[str, str]
    command: str | None = None
    calibration: dict[str, Any] | None = None
    timing: dict[str, Any] = field(default_factory=dict)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all packed weights, adapters apart."""
        return sum(m.weight_bytes for m in self.modules)

    @property
    def adapter_bytes(self) -> int:
        return sum(m.adapter_bytes for m in self.modules)

    @property
    def bits_per_weight(self) -> float:
        """Measured average over the quantized modules, from stored bytes, adapters apart."""
        return 8 * self.weight_bytes / sum(m.numel for m in self.modules)

    @property
    def mean_error(self) -> float:
        """Mean over the modules of the relative error of the result."""
        return sum(m.error for m in self.modules) / len(self.modules)

    @property
    def mean_quantization_error(self) -> float:
        """Mean over the modules of the relative error of plain quantization."""
        return sum(m.quantization_error for m in self.modules) / len(self.modules)

    def totals(self) -> dict[str, Any]:
        return {
            "modules": len(self.modules),
            "weights": sum(m.numel for m in self.modules),
            "bits_per_weight": self.bits_per_weight,
            "weight_bytes": self.weight_bytes,
            "adapter_bytes": self.adapter_bytes,
            "other_bytes": self.other_bytes,
            "mean_quantization_error": self.mean_quantization_error,
            "mean_error": self.mean_error,
        }

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        modules = values.pop("modules")
        for module in modules:
            if module["experts"] is None:
                del module["experts"]
        return {"totals": self.totals(), **values, "modules": modules}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantizationReport:
        values = {k: v for k, v in values.items() if k != "totals"}
        return cls(**{**values, "modules": [ModuleRecord(**m) for m in values["modules"]]})

    def save(self, directory: Path) -> None:
        (directory / REPORT).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> QuantizationReport:
        """Read a folder's report.

        Raises:
            SourceError: if the folder has none, or a damaged one.
        """
        path = Path(directory) / REPORT
        if not path.exists():
            raise SourceError(f"{directory} has no {REPORT}, expected a folder that `loftq quantize` has written")
        try:
            report = cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
            if not report.modules:
                raise ValueError("it lists no modules")
            return report
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise SourceError(f"{path} is damaged ({error}); quantize again") from None
