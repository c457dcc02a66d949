"""Checkpoints: written atomically with a checksum, read as data only, and loaded strictly."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigmodel.checkpoint.archive import clear_hidden
    from bigmodel.checkpoint.files import AtomicCheckpointIO, content_hash, find_damage, read, size_on_disk
    from bigmodel.checkpoint.selection import checkpoint_step, find_checkpoint
    from bigmodel.checkpoint.sharded import LazyShardedTensor, distribute_like, gather_full
    from bigmodel.checkpoint.weights import load_weights

__all__ = [
    "AtomicCheckpointIO",
    "LazyShardedTensor",
    "checkpoint_step",
    "clear_hidden",
    "content_hash",
    "distribute_like",
    "find_checkpoint",
    "find_damage",
    "gather_full",
    "load_weights",
    "read",
    "size_on_disk",
]

_MODULES = {
    "AtomicCheckpointIO": "bigmodel.checkpoint.files",
    "checkpoint_step": "bigmodel.checkpoint.selection",
    "clear_hidden": "bigmodel.checkpoint.archive",
    "content_hash": "bigmodel.checkpoint.files",
    "distribute_like": "bigmodel.checkpoint.sharded",
    "find_checkpoint": "bigmodel.checkpoint.selection",
    "find_damage": "bigmodel.checkpoint.files",
    "gather_full": "bigmodel.checkpoint.sharded",
    "LazyShardedTensor": "bigmodel.checkpoint.sharded",
    "load_weights": "bigmodel.checkpoint.weights",
    "read": "bigmodel.checkpoint.files",
    "size_on_disk": "bigmodel.checkpoint.files",
}


def __getattr__(name: str) -> Any:
    """Import lazily, so that the table of renamed paths is read without importing torch."""
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'bigmodel.checkpoint' has no attribute {name!r}")
