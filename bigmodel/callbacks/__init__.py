"""Callbacks for any task. `Gradients` and `Resume` are always on, the others by name in the configuration."""

from bigmodel.callbacks.ema import EMA
from bigmodel.callbacks.gradients import Gradients
from bigmodel.callbacks.predictions import PredictionWriter
from bigmodel.callbacks.progress import ProgressLine
from bigmodel.callbacks.resume import Resume
from bigmodel.callbacks.samples import Samples
from bigmodel.callbacks.swa import SWA
from bigmodel.callbacks.training_log import TrainingLog

__all__ = ["EMA", "SWA", "Gradients", "PredictionWriter", "ProgressLine", "Resume", "Samples", "TrainingLog"]
