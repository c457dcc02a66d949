"""Larger than a device: sharding, tensor parallelism, activation checkpointing, compilation, applied to a net from outside it."""

from bigmodel.parallel.strategy import ShardedStrategy
from bigmodel.parallel.tensor_parallel import tensor_parallel

__all__ = ["ShardedStrategy", "tensor_parallel"]
