"""Callbacks for any task. Gradients, Resume, DiskSpace and Preemption are always on, others by name in the configuration."""

from bigmodel.callbacks.anomalies import Anomalies, GoBack
from bigmodel.callbacks.disk import DiskSpace
from bigmodel.callbacks.ema import EMA
from bigmodel.callbacks.gradients import Gradients
from bigmodel.callbacks.predictions import PredictionWriter
from bigmodel.callbacks.preemption import Preemption, Stopped
from bigmodel.callbacks.progress import ProgressLine
from bigmodel.callbacks.resume import Resume
from bigmodel.callbacks.samples import Samples
from bigmodel.callbacks.swa import SWA
from bigmodel.callbacks.times import Times
from bigmodel.callbacks.training_log import TrainingLog
from bigmodel.callbacks.watchdog import Watchdog

__all__ = [
    "EMA",
    "SWA",
    "Anomalies",
    "DiskSpace",
    "GoBack",
    "Gradients",
    "PredictionWriter",
    "Preemption",
    "ProgressLine",
    "Resume",
    "Samples",
    "Stopped",
    "Times",
    "TrainingLog",
    "Watchdog",
]
