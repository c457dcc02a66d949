"""Tensors of a sharded checkpoint: read completely or in part, and distributed over the current mesh."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigmodel.checkpoint.archive import read_archive
from bigmodel.checkpoint.manifest import STATE, read_manifest, shard_name
from bigmodel.checkpoint.parts import Keys, local_part, map_tree


class LazyShardedTensor:
    """Tensor of a sharded checkpoint that has not been read.

    Attributes:
        shape: that of the whole tensor.
        dtype: its type.
    """

    def __init__(self, name: str, entry: dict[str, Any], open_shard: Callable[[int], Any]) -> None:
        self.shape = torch.Size(entry["shape"])
        self.dtype: torch.dtype = getattr(torch, entry["dtype"])
        self._name, self._parts, self._open_shard = name, entry["parts"], open_shard

    def __repr__(self) -> str:
        return f"LazyShardedTensor({self._name}, {list(self.shape)}, {self.dtype})"

    def whole(self) -> Tensor:
        """Return the whole tensor, on the CPU."""
        return self.part([0] * len(self.shape), self.shape)

    def part(self, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Return the part that begins at `offsets` and has `sizes`, on the CPU. Only overlapping pieces are read.

        A part that lies in one file stays memory-mapped, and may be a non-contiguous view.

        Raises:
            ValueError: if a file cannot be read.
        """
        made = None
        for rank, starts, lengths in self._parts:
            begins = [max(pair) for pair in zip(offsets, starts, strict=True)]
            ends = [min(a + n, b + m) for a, n, b, m in zip(offsets, sizes, starts, lengths, strict=True)]
            if any(begin >= end for begin, end in zip(begins, ends, strict=True)):
                continue
            piece = self._open_shard(rank).get_tensor(self._name)[_slices(begins, ends, starts)]
            if piece.shape == torch.Size(sizes):
                return piece
            made = torch.empty(tuple(sizes), dtype=self.dtype) if made is None else made
            made[_slices(begins, ends, offsets)] = piece
        assert made is not None or not math.prod(sizes), (self, offsets, sizes)
        return torch.empty(tuple(sizes), dtype=self.dtype) if made is None else made


def _slices(begins: Sequence[int], ends: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(begin - at, end - at) for begin, end, at in zip(begins, ends, origin, strict=True))


def read_folder(folder: Path) -> Any:
    """Return the checkpoint in a folder, with a `LazyShardedTensor` for each sharded tensor.

    Raises:
        ValueError: if it cannot be read, or holds more than tensors and plain values.
    """
    from safetensors import SafetensorError, safe_open

    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        raise ValueError(f"{folder} cannot be read as a checkpoint: {error}") from None

    @functools.cache
    def open_shard(rank: int) -> Any:
        path = folder / shard_name(rank, manifest["processes"])
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read as a part of a checkpoint: {error}") from error

    leaves: dict[Keys, LazyShardedTensor] = {}
    for name, entry in manifest["tensors"].items():
        sharded = LazyShardedTensor(name, entry, open_shard)
        leaves |= {tuple(keys): sharded for keys in entry["paths"]}
    return map_tree(read_archive(folder / STATE), lambda keys, leaf: leaves.get(keys, leaf))


def gather_full(checkpoint: Any) -> Any:
    """Return the checkpoint with each `LazyShardedTensor` read completely; tied ones stay tied."""
    read: dict[LazyShardedTensor, Tensor] = {}

    def whole(_: Keys, leaf: Any) -> Any:
        if not isinstance(leaf, LazyShardedTensor):
            return leaf
        if leaf not in read:
            read[leaf] = leaf.whole()
        return read[leaf]

    return map_tree(checkpoint, whole)


def distribute_like(leaf: Tensor | LazyShardedTensor, like: Tensor) -> Tensor:
    """Return a tensor with the layout and device of `like`, and the values and type of the leaf.

    If `like` is a DTensor, each process takes or reads only its own part, without communication.

    Raises:
        ValueError: if the shapes differ, or a file cannot be read.
    """
    from torch.distributed.tensor import DTensor

    if leaf.shape != like.shape:
        raise ValueError(f"a tensor of shape {list(leaf.shape)} cannot be placed as one of {list(like.shape)}")
    assert not like.is_meta, "there is no memory to place it in"
    if not isinstance(like, DTensor):
        return (leaf.whole() if isinstance(leaf, LazyShardedTensor) else leaf).to(like.device)
    placed = torch.empty_like(like, dtype=leaf.dtype)  # from_local would move CPU-offloaded tensors to the GPU
    own = local_part(like)
    if own is not None:
        offsets, sizes = own
        if isinstance(leaf, LazyShardedTensor):
            part = leaf.part(offsets, sizes)
        else:
            part = leaf[_slices(offsets, [a + n for a, n in zip(offsets, sizes, strict=True)], [0] * leaf.ndim)]
        placed.to_local().copy_(part)  # type: ignore[attr-defined]
    return placed
