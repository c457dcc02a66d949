"""Transfer learning: fine-tune a pretrained model for a new task."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigmodel.tasks.transfer_learning.batches import LabelledTextBatch
    from bigmodel.tasks.transfer_learning.data import LabelledTextData
    from bigmodel.tasks.transfer_learning.methods import BiasOnly, Full, Gradual, KNNProbe, LinearProbe, LoRA, Method
    from bigmodel.tasks.transfer_learning.module import TransferLearning
    from bigmodel.tasks.transfer_learning.penalties import L1, L2SP, Penalty
    from bigmodel.tasks.transfer_learning.splits import Split

__all__ = [
    "L1",
    "L2SP",
    "BiasOnly",
    "Full",
    "Gradual",
    "KNNProbe",
    "LabelledTextBatch",
    "LabelledTextData",
    "LinearProbe",
    "LoRA",
    "Method",
    "Penalty",
    "Split",
    "TransferLearning",
]
_WHERE = {
    "batches": ("LabelledTextBatch",),
    "data": ("LabelledTextData",),
    "methods": ("BiasOnly", "Full", "Gradual", "KNNProbe", "LinearProbe", "LoRA", "Method"),
    "module": ("TransferLearning",),
    "penalties": ("L1", "L2SP", "Penalty"),
    "splits": ("Split",),
}


def __getattr__(name: str) -> Any:
    """Import on first access."""
    for module, names in _WHERE.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
