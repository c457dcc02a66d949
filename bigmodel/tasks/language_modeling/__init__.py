"""Language modeling: train a model that continues text."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigmodel.tasks.language_modeling.data import TextBatch, TextData
    from bigmodel.tasks.language_modeling.module import LanguageModeling
    from bigmodel.tasks.language_modeling.splits import ContiguousSplit, DocumentHashSplit, FileSplit
    from bigmodel.tasks.language_modeling.tokenizer_config import BPE, Bytes, Characters, FromRun, Pretrained

__all__ = [
    "BPE",
    "Bytes",
    "Characters",
    "ContiguousSplit",
    "DocumentHashSplit",
    "FileSplit",
    "FromRun",
    "LanguageModeling",
    "Pretrained",
    "TextBatch",
    "TextData",
]
_WHERE = {
    "data": ("TextBatch", "TextData"),
    "module": ("LanguageModeling",),
    "splits": ("DocumentHashSplit", "FileSplit", "ContiguousSplit"),
    "tokenizer_config": ("BPE", "Bytes", "Characters", "FromRun", "Pretrained"),
}


def __getattr__(name: str) -> Any:
    """Import on first access: the processes that tokenize need neither torch nor Lightning."""
    for module, names in _WHERE.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
