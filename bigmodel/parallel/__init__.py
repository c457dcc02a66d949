"""Large nets: built without memory, found in their blocks, and made to need less memory and time."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bigmodel.parallel.deferred import Initialization, deferred

if TYPE_CHECKING:
    from bigmodel.parallel.blocks import ActivationCheckpointing, find_blocks
    from bigmodel.parallel.compilation import Compile
    from bigmodel.parallel.float8 import Float8

__all__ = ["ActivationCheckpointing", "Compile", "Float8", "Initialization", "deferred", "find_blocks"]

_MODULES = {
    "ActivationCheckpointing": "blocks",
    "Compile": "compilation",
    "Float8": "float8",
    "find_blocks": "blocks",
}


def __getattr__(name: str) -> Any:
    """These import Lightning, which takes seconds: that waits until they are used."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"bigmodel.parallel.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'bigmodel.parallel' has no attribute {name!r}")
