"""Plain torch modules, usable without the rest of bigmodel."""

from bigmodel.nn.attention import KVCache
from bigmodel.nn.loss import cross_entropy_sum
from bigmodel.nn.transformer import GPT

__all__ = ["GPT", "KVCache", "cross_entropy_sum"]
