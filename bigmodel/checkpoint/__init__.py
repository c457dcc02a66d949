"""Weights in and out: written atomically with a checksum, read as data only, and loaded strictly unless excused by name."""

from bigmodel.checkpoint.callback import Checkpoint
from bigmodel.checkpoint.files import AtomicCheckpointIO, damage, read
from bigmodel.checkpoint.weights import load_weights

__all__ = ["AtomicCheckpointIO", "Checkpoint", "damage", "load_weights", "read"]
