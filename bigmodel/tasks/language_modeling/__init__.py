"""Language modeling: text in, a model that continues text out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigmodel.tasks.language_modeling.data import TextBatch, TextData
    from bigmodel.tasks.language_modeling.module import LanguageModeling
    from bigmodel.tasks.language_modeling.splits import ByDocument, ByFiles, ByPosition
    from bigmodel.tasks.language_modeling.tokenizer_choice import BPE, Bytes, Characters, OfRun, Pretrained

__all__ = [
    "BPE",
    "ByDocument",
    "ByFiles",
    "ByPosition",
    "Bytes",
    "Characters",
    "LanguageModeling",
    "OfRun",
    "Pretrained",
    "TextBatch",
    "TextData",
]
_WHERE = {
    "data": ("TextBatch", "TextData"),
    "module": ("LanguageModeling",),
    "splits": ("ByDocument", "ByFiles", "ByPosition"),
    "tokenizer_choice": ("BPE", "Bytes", "Characters", "OfRun", "Pretrained"),
}


def __getattr__(name: str) -> Any:
    """Import what is asked for and no more: the processes that tokenize need neither torch nor Lightning."""
    for module, names in _WHERE.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
