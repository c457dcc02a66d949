"""Larger than a device: nets built without memory, sharded and cut over processes, and made to need less memory and time.

All of it is applied to a net from outside of it, by its blocks.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bigmodel.parallel.deferred import Initialization, deferred

if TYPE_CHECKING:
    from bigmodel.parallel.blocks import ActivationCheckpointing, find_blocks
    from bigmodel.parallel.compilation import Compile
    from bigmodel.parallel.float8 import Float8
    from bigmodel.parallel.strategy import ShardedStrategy

__all__ = [
    "ActivationCheckpointing",
    "Compile",
    "Float8",
    "Initialization",
    "ShardedStrategy",
    "deferred",
    "find_blocks",
]

_MODULES = {
    "ActivationCheckpointing": "blocks",
    "Compile": "compilation",
    "Float8": "float8",
    "ShardedStrategy": "strategy",
    "find_blocks": "blocks",
}


def __getattr__(name: str) -> Any:
    """Imported when used: callbacks and strategy import from parts of this package that callbacks themselves need."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"bigmodel.parallel.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'bigmodel.parallel' has no attribute {name!r}")
