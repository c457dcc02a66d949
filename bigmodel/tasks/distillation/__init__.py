"""Distillation: train a student task with a trained teacher task."""

from bigmodel.tasks.distillation.cache import TeacherCache
from bigmodel.tasks.distillation.loss_terms import (
    DKD,
    KD,
    AttentionTransfer,
    GeneralizedJSD,
    Hint,
    HuberError,
    Relational,
    SimilarityPreserving,
    SquaredError,
    Term,
)
from bigmodel.tasks.distillation.mean_teacher import MeanTeacher
from bigmodel.tasks.distillation.module import Distillation
from bigmodel.tasks.distillation.on_policy import OnPolicy

__all__ = [
    "DKD",
    "KD",
    "AttentionTransfer",
    "Distillation",
    "GeneralizedJSD",
    "Hint",
    "HuberError",
    "MeanTeacher",
    "OnPolicy",
    "Relational",
    "SimilarityPreserving",
    "SquaredError",
    "TeacherCache",
    "Term",
]
