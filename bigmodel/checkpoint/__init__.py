"""Checkpoints: written atomically with a checksum, read as data only, and loaded strictly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigmodel import lazy_attributes

if TYPE_CHECKING:
    from bigmodel.checkpoint.archive import clear_hidden
    from bigmodel.checkpoint.files import AtomicCheckpointIO, content_hash, find_damage, read, size_on_disk
    from bigmodel.checkpoint.selection import checkpoint_step, find_checkpoint
    from bigmodel.checkpoint.sharded import LazyShardedTensor, distribute_like, gather_full
    from bigmodel.checkpoint.shards import save_tensors
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
    "save_tensors",
    "size_on_disk",
]

# The table of renamed paths (`bigmodel.checkpoint.renamed`) is read without importing torch.
__getattr__ = lazy_attributes(
    __name__,
    {
        "bigmodel.checkpoint.archive": "clear_hidden",
        "bigmodel.checkpoint.files": "AtomicCheckpointIO content_hash find_damage read size_on_disk",
        "bigmodel.checkpoint.selection": "checkpoint_step find_checkpoint",
        "bigmodel.checkpoint.sharded": "LazyShardedTensor distribute_like gather_full",
        "bigmodel.checkpoint.shards": "save_tensors",
        "bigmodel.checkpoint.weights": "load_weights",
    },
)
