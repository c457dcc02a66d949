"""Weights in and out: written atomically with a checksum, read as data only, and loaded strictly unless excused by name."""

from bigmodel.checkpoint.callback import Checkpoint, validation_due
from bigmodel.checkpoint.choose import checkpoint_step, find_checkpoint
from bigmodel.checkpoint.files import AtomicCheckpointIO, damage, read
from bigmodel.checkpoint.weights import load_weights

__all__ = [
    "AtomicCheckpointIO",
    "Checkpoint",
    "checkpoint_step",
    "damage",
    "find_checkpoint",
    "load_weights",
    "read",
    "validation_due",
]
