"""Tuning the adapters of a quantized folder against its full-precision source."""

from loftq.refine.record import RefinementReport, StageRecord
from loftq.refine.run import refine
from loftq.refine.settings import RefineSettings

__all__ = ["RefineSettings", "RefinementReport", "StageRecord", "refine"]
