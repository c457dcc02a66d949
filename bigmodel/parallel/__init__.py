"""Training of nets larger than a device: deferred initialization, sharding, tensor parallelism, lower memory and time.

All of it is applied to a net from the outside, by its blocks.
"""

from bigmodel.parallel.blocks import ActivationCheckpointing, find_blocks
from bigmodel.parallel.compilation import Compile
from bigmodel.parallel.deferred import Initialization, deferred
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
