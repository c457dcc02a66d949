"""Recommendation: train a model on the events of users that predicts their next items."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigmodel.tasks.recommendation.batches import EvalBatch, PairBatch, SequenceBatch, UserBatch
    from bigmodel.tasks.recommendation.data import InteractionData
    from bigmodel.tasks.recommendation.filters import Filters
    from bigmodel.tasks.recommendation.interactions import Interactions, SparseMatrix
    from bigmodel.tasks.recommendation.losses import BCE, BPR, GBCE, FullSoftmax, SampledSoftmax, SquaredError
    from bigmodel.tasks.recommendation.module import PairRecommendation, SequentialRecommendation
    from bigmodel.tasks.recommendation.non_neural import NonNeuralRecommendation
    from bigmodel.tasks.recommendation.splits import GlobalTime, LeaveOneOut, Ratio

__all__ = [
    "BCE",
    "BPR",
    "GBCE",
    "EvalBatch",
    "Filters",
    "FullSoftmax",
    "GlobalTime",
    "InteractionData",
    "Interactions",
    "LeaveOneOut",
    "NonNeuralRecommendation",
    "PairBatch",
    "PairRecommendation",
    "Ratio",
    "SampledSoftmax",
    "SequenceBatch",
    "SequentialRecommendation",
    "SparseMatrix",
    "SquaredError",
    "UserBatch",
]
_WHERE = {
    "batches": ("EvalBatch", "PairBatch", "SequenceBatch", "UserBatch"),
    "data": ("InteractionData",),
    "filters": ("Filters",),
    "non_neural": ("NonNeuralRecommendation",),
    "interactions": ("Interactions", "SparseMatrix"),
    "losses": ("BCE", "BPR", "GBCE", "FullSoftmax", "SampledSoftmax", "SquaredError"),
    "module": ("PairRecommendation", "SequentialRecommendation"),
    "splits": ("GlobalTime", "LeaveOneOut", "Ratio"),
}


def __getattr__(name: str) -> Any:
    """Import on first access: reading tables needs neither torch nor Lightning."""
    for module, names in _WHERE.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
