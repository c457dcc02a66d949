"""Large nets: built without memory, found in their blocks, and made to need less memory and time."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigmodel.parallel.blocks import ActivationCheckpointing, find_blocks
    from bigmodel.parallel.compilation import Compile
    from bigmodel.parallel.deferred import Initialization, deferred

__all__ = ["ActivationCheckpointing", "Compile", "Initialization", "deferred", "find_blocks"]

_MODULES = {
    "ActivationCheckpointing": "blocks",
    "Compile": "compilation",
    "Initialization": "deferred",
    "deferred": "deferred",
    "find_blocks": "blocks",
}


def __getattr__(name: str) -> Any:
    """What is not a callback does without Lightning, which takes seconds to import."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"bigmodel.parallel.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'bigmodel.parallel' has no attribute {name!r}")
