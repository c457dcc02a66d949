"""Calculations, comparisons and descriptions for `bigmodel check`: pure functions."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from bigmodel.checkpoint import LazyShardedTensor, distribute_like
from bigmodel.internals import save_triggers
from bigmodel.training.callbacks import Checkpoint


def num_validations(batches: float, per_epoch: float, every: float, every_n_epoch: int | None) -> int:
    """Return the number of validations in a run.

    Args:
        batches: micro-batches of the whole run.
        per_epoch: micro-batches of an epoch.
        every: micro-batches between validations: of an epoch, or of the run if `every_n_epoch` is None.
        every_n_epoch: validate only in every n-th epoch.
    """
    if every_n_epoch is None:
        return int(batches // every)
    every = min(every, per_epoch)
    epochs, rest = divmod(batches, per_epoch)
    in_last = rest // every if (epochs + 1) % every_n_epoch == 0 else 0
    return int(epochs // every_n_epoch * (per_epoch // every) + in_last) if epochs else int(in_last)


def num_saves(callback: Checkpoint | ModelCheckpoint, steps: int, seconds: float, validations: int) -> int:
    """Return the maximum number of checkpoints of a callback in a run of so many steps, seconds and validations."""
    if callback.save_top_k == 0:
        return 0
    if isinstance(callback, Checkpoint):
        every = callback.every_n_steps
        interval = None if callback.every_n_minutes is None else 60 * callback.every_n_minutes
    else:
        every, interval = save_triggers(callback)
    if callback.monitor is None and every:
        return -(-steps // every)  # the last step is always saved
    if callback.monitor is None and interval is not None:
        return int(seconds // interval) + 1
    return validations


def different(a: Any, b: Any, name: str = "") -> list[str]:
    """Return the names of entries that are not bitwise equal in two checkpoints, such as `state_dict/net.weight`."""
    if isinstance(b, LazyShardedTensor) and isinstance(a, Tensor) and a.shape == b.shape:  # the local part
        a, b = (tensor.to_local() for tensor in (a, distribute_like(b, a)))  # type: ignore[attr-defined]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))
        return [] if same else [name]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [wrong for key in a for wrong in different(a[key], b[key], f"{name}/{key}".lstrip("/"))]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [wrong for i, pair in enumerate(zip(a, b, strict=True)) for wrong in different(*pair, f"{name}/{i}")]
    # NaN is not equal to itself, but counts as the same.
    return [] if type(a) is type(b) and (a == b or repr(a) == repr(b)) else [name]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def describe(batch: Any) -> str:
    """Format the shapes and types of a batch, as in `Rows(features [32, 2] float32, ...)`."""
    if isinstance(batch, Tensor):
        return f"{list(batch.shape)} {str(batch.dtype).removeprefix('torch.')}"
    if isinstance(batch, dict):
        return "{" + ", ".join(f"{name} {describe(value)}" for name, value in batch.items()) + "}"
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        fields = ", ".join(f"{name} {describe(value)}" for name, value in zip(batch._fields, batch, strict=True))
        return f"{type(batch).__name__}({fields})"
    if isinstance(batch, list | tuple):
        return f"({', '.join(map(describe, batch))})"
    return type(batch).__name__


def amount(num_bytes: float) -> str:
    """Format a number of bytes in powers of 1000."""
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:,.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} GB"
