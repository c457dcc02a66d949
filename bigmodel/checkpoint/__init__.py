"""Weights in and out: written atomically with a checksum, read as data only, and loaded strictly unless excused by name."""

from bigmodel.checkpoint.archive import clear_hidden
from bigmodel.checkpoint.callback import Checkpoint, validation_due
from bigmodel.checkpoint.choose import checkpoint_step, find_checkpoint
from bigmodel.checkpoint.files import AtomicCheckpointIO, damage, identity, read, size_on_disk
from bigmodel.checkpoint.sharded import Sharded, assembled, place
from bigmodel.checkpoint.weights import load_weights

__all__ = [
    "AtomicCheckpointIO",
    "Checkpoint",
    "Sharded",
    "assembled",
    "checkpoint_step",
    "clear_hidden",
    "damage",
    "find_checkpoint",
    "identity",
    "load_weights",
    "place",
    "read",
    "size_on_disk",
    "validation_due",
]
