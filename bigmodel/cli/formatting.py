"""Formatting and comparison of values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigmodel.checkpoint import LazyShardedTensor, distribute_like


def find_differences(a: Any, b: Any, name: str = "") -> list[str]:
    """Return the names of entries that are not bitwise equal in two checkpoints, such as `state_dict/net.weight`."""
    if isinstance(b, LazyShardedTensor) and isinstance(a, Tensor) and a.shape == b.shape:  # the local part
        a, b = (tensor.to_local() for tensor in (a, distribute_like(b, a)))  # type: ignore[attr-defined]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))
        return [] if same else [name]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [wrong for key in a for wrong in find_differences(a[key], b[key], f"{name}/{key}".lstrip("/"))]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [
            wrong for i, pair in enumerate(zip(a, b, strict=True)) for wrong in find_differences(*pair, f"{name}/{i}")
        ]
    # NaN is not equal to itself, but counts as the same.
    return [] if type(a) is type(b) and (a == b or repr(a) == repr(b)) else [name]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def format_batch(batch: Any) -> str:
    """Format the shapes and types of a batch, as in `Rows(features [32, 2] float32, ...)`."""
    if isinstance(batch, Tensor):
        return f"{list(batch.shape)} {str(batch.dtype).removeprefix('torch.')}"
    if isinstance(batch, dict):
        return "{" + ", ".join(f"{name} {format_batch(value)}" for name, value in batch.items()) + "}"
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        fields = ", ".join(f"{name} {format_batch(value)}" for name, value in zip(batch._fields, batch, strict=True))
        return f"{type(batch).__name__}({fields})"
    if isinstance(batch, list | tuple):
        return f"({', '.join(map(format_batch, batch))})"
    return type(batch).__name__


def format_bytes(num_bytes: float) -> str:
    """Format a number of bytes in powers of 1000."""
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:,.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} GB"
