"""Transfer learning: fine-tune a pretrained model for a new task."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigmodel.tasks.transfer_learning.batches import LabelledTextBatch
    from bigmodel.tasks.transfer_learning.data import LabelledTextData
    from bigmodel.tasks.transfer_learning.methods import (
        BiasOnly,
        FullFineTuning,
        GradualUnfreezing,
        KNNProbe,
        LinearProbe,
        LoRA,
        Method,
    )
    from bigmodel.tasks.transfer_learning.module import TransferLearning
    from bigmodel.tasks.transfer_learning.penalties import L1Penalty, L2SPPenalty, Penalty
    from bigmodel.tasks.transfer_learning.splits import TextSplit

__all__ = [
    "BiasOnly",
    "FullFineTuning",
    "GradualUnfreezing",
    "KNNProbe",
    "L1Penalty",
    "L2SPPenalty",
    "LabelledTextBatch",
    "LabelledTextData",
    "LinearProbe",
    "LoRA",
    "Method",
    "Penalty",
    "TextSplit",
    "TransferLearning",
]
_WHERE = {
    "batches": ("LabelledTextBatch",),
    "data": ("LabelledTextData",),
    "methods": ("BiasOnly", "FullFineTuning", "GradualUnfreezing", "KNNProbe", "LinearProbe", "LoRA", "Method"),
    "module": ("TransferLearning",),
    "penalties": ("L1Penalty", "L2SPPenalty", "Penalty"),
    "splits": ("TextSplit",),
}


def __getattr__(name: str) -> Any:
    """Import on first access."""
    for module, names in _WHERE.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
