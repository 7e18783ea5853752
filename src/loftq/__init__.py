"""loftq: quantized LoRA fine-tuning that starts where the original model was.

``import loftq`` registers ``quant_method: loftq`` with transformers, so that its folders load like any other.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from loftq.config import PUBLISHED, LoftQConfig, QuantSpec
from loftq.errors import (
    BackboneMismatchError,
    ClusterError,
    ConfigError,
    LoftQError,
    OutputError,
    SourceError,
    WeightError,
)
from loftq.hub.registration import register_with_transformers

if TYPE_CHECKING:
    from loftq.calibrate.collect import collect_from_model
    from loftq.calibrate.statistics import Statistics
    from loftq.calibrate.text import CalibrationTokens, calibration_tokens
    from loftq.codec import QuantizedTensor
    from loftq.export.dense import export_dense
    from loftq.hub.load import load
    from loftq.live import quantize_model, save
    from loftq.modules import QuantEmbedding, QuantExperts, QuantLinear
    from loftq.pipeline import quantize_checkpoint
    from loftq.report.record import QuantizationReport
    from loftq.solver import Decomposition, decompose
    from loftq.solver.importance import InputStatistics

try:
    __version__ = version("loftq")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0.0.0"

# Name -> module that defines it, imported when first used: `loftq --help` must not wait for torch.
_LAZY = {
    "CalibrationTokens": "loftq.calibrate.text",
    "Decomposition": "loftq.solver",
    "InputStatistics": "loftq.solver.importance",
    "QuantEmbedding": "loftq.modules",
    "QuantExperts": "loftq.modules",
    "QuantLinear": "loftq.modules",
    "QuantizationReport": "loftq.report.record",
    "QuantizedTensor": "loftq.codec",
    "Statistics": "loftq.calibrate.statistics",
    "calibration_tokens": "loftq.calibrate.text",
    "collect_from_model": "loftq.calibrate.collect",
    "decompose": "loftq.solver",
    "export_dense": "loftq.export.dense",
    "load": "loftq.hub.load",
    "quantize_checkpoint": "loftq.pipeline",
    "quantize_model": "loftq.live",
    "save": "loftq.live",
}

__all__ = [
    "BackboneMismatchError",
    "ClusterError",
    "ConfigError",
    "LoftQConfig",
    "LoftQError",
    "OutputError",
    "PUBLISHED",
    "QuantSpec",
    "SourceError",
    "WeightError",
    "__version__",
    *_LAZY,
]


register_with_transformers()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'loftq' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
