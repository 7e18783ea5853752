"""What a quantized model takes: bytes predicted from a configuration, measured in a folder, and needed for training."""

from loftq.report.memory.footprint import Footprint, Part
from loftq.report.memory.measure import measure_footprint
from loftq.report.memory.predict import predict_footprint
from loftq.report.memory.training import TrainingMemory, TrainingSetup, predict_training

__all__ = [
    "Footprint",
    "Part",
    "TrainingMemory",
    "TrainingSetup",
    "measure_footprint",
    "predict_footprint",
    "predict_training",
]
