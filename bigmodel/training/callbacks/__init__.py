"""Callbacks for any task. GradientScaling, Resume, DiskSpace and Preemption are always on; others are optional."""

from bigmodel.training.callbacks.anomalies import Anomalies, RollbackRequested
from bigmodel.training.callbacks.checkpoint import Checkpoint
from bigmodel.training.callbacks.disk import DiskSpace
from bigmodel.training.callbacks.ema import EMA
from bigmodel.training.callbacks.gradient_scaling import GradientScaling
from bigmodel.training.callbacks.preemption import Preempted, Preemption
from bigmodel.training.callbacks.progress import ProgressLine
from bigmodel.training.callbacks.resume import Resume
from bigmodel.training.callbacks.samples import Samples
from bigmodel.training.callbacks.step_timer import StepTimer
from bigmodel.training.callbacks.swa import SWA
from bigmodel.training.callbacks.training_log import TrainingLog
from bigmodel.training.callbacks.watchdog import Watchdog

__all__ = [
    "EMA",
    "SWA",
    "Anomalies",
    "Checkpoint",
    "DiskSpace",
    "GradientScaling",
    "Preempted",
    "Preemption",
    "ProgressLine",
    "Resume",
    "RollbackRequested",
    "Samples",
    "StepTimer",
    "TrainingLog",
    "Watchdog",
]
