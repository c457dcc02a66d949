"""Training of nets larger than a device: deferred initialization, sharding, tensor parallelism, lower memory and time.

All of it is applied to a net from the outside, by its blocks.
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
    """Import lazily: callbacks and strategy depend on parts of this package that callbacks themselves import."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"bigmodel.parallel.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'bigmodel.parallel' has no attribute {name!r}")
