"""Sharded tensors of a checkpoint, and the part of each that a process holds."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, distributed

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Keys = tuple[str | int, ...]  # from the root of a checkpoint to a leaf


def map_tree(tree: Any, change: Callable[[Keys, Any], Any], at: Keys = ()) -> Any:
    """Return a copy of nested dicts, lists and tuples with each leaf replaced by `change(keys, leaf)`."""
    if isinstance(tree, dict):
        made = copy.copy(tree)  # keeps the class, and attributes such as a state_dict's _metadata
        for key, value in tree.items():
            made[key] = map_tree(value, change, (*at, key))
        return made
    if isinstance(tree, list | tuple):
        values = [map_tree(value, change, (*at, i)) for i, value in enumerate(tree)]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return change(at, tree)


def split(checkpoint: Any) -> tuple[Any, dict[Keys, DTensor]]:
    """Return the checkpoint with None in place of each DTensor, and the DTensors; unchanged without a process group."""
    tensors: dict[Keys, DTensor] = {}
    if not (distributed.is_available() and distributed.is_initialized()):
        return checkpoint, tensors
    from torch.distributed.tensor import DTensor

    def take(keys: Keys, leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        tensors[keys] = leaf
        return None

    rest = map_tree(checkpoint, take)
    return (rest, tensors) if tensors else (checkpoint, tensors)


def local_part(tensor: DTensor, name: str = "a tensor") -> tuple[list[int], list[int]] | None:
    """Return the offsets and sizes of this process's part of a DTensor; None if it is not in its mesh.

    torch's own `compute_local_shape_and_global_offset` is wrong for some uneven sizes of FSDP2 over tensor parallelism
    (7 rows on 3 x 2 processes). There, _StridedShard means that the mesh dimensions to its right divide the tensor
    before it.

    Raises:
        ValueError: if the layout does not consist of contiguous parts.
    """
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return None
    order: list[tuple[int, int]] = []  # mesh dimension, tensor dimension: in the order of division
    for mesh_dim, placement in reversed(list(enumerate(tensor.placements))):
        assert not placement.is_partial(), f"{name}: a gradient that is not reduced yet"
        dim, strides = getattr(placement, "dim", None), getattr(placement, "split_factor", 1)
        if dim is None:  # replicated
            continue
        inner = math.prod(mesh.shape[other] for other, its_dim in order if its_dim == dim)
        if strides not in (1, inner):
            raise ValueError(
                f"{name}: {placement} of {tensor.placements} is not a layout of contiguous parts, which a checkpoint needs"
            )
        order.insert(len(order) if strides > 1 else 0, (mesh_dim, dim))
    offsets, sizes = [0] * tensor.ndim, list(tensor.shape)
    for mesh_dim, dim in order:
        step = -(-sizes[dim] // mesh.shape[mesh_dim])  # as torch.chunk
        start = min(sizes[dim], step * coordinate[mesh_dim])
        offsets[dim], sizes[dim] = offsets[dim] + start, min(step, sizes[dim] - start)
    held = list(tensor.to_local().shape)
    if held != sizes:
        raise ValueError(f"{name}: a process holds {held} of {list(tensor.shape)}, and should hold {sizes}")
    return offsets, sizes


def own_parts(tensors: dict[Keys, DTensor], copied: bool) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Return a record of each tensor, with its part's name if this process writes one; and these parts, on the CPU."""
    records: list[dict[str, Any]] = []
    parts: dict[str, Tensor] = {}
    tied: dict[Any, str] = {}
    memory: set[int] = set()
    names: set[str] = set()
    for keys, tensor in tensors.items():
        name = "/".join(map(str, keys))
        if name in names or not all(isinstance(key, str | int) for key in keys):
            raise ValueError(f"keys of a sharded tensor must be unique, and strings or integers: {keys}")
        names.add(name)
        dtype = str(tensor.dtype).removeprefix("torch.")
        record: dict[str, Any] = {"keys": keys, "name": name, "shape": list(tensor.shape), "dtype": dtype}
        records.append(record)
        own = local_part(tensor, name)
        local = tensor.to_local().detach()
        if type(local) is not Tensor:
            raise ValueError(f"{name}: the local part is a {type(local).__name__}; only plain tensors can be saved")
        if own is None or not local.numel() or not _is_first_copy(tensor):
            continue
        same = (local.data_ptr(), local.dtype, local.shape, local.stride(), tensor.shape, tensor.placements)
        if same not in tied:
            tied[same] = name
            shared = local.untyped_storage().data_ptr() in memory  # with an overlapping tensor: each is stored
            memory.add(local.untyped_storage().data_ptr())
            parts[name] = local.contiguous().to("cpu", copy=copied or shared)
        record |= {"name": tied[same], "part": own}
    return records, parts


def _is_first_copy(tensor: DTensor) -> bool:
    """True if this process is the first along each mesh dimension over which the tensor is replicated."""
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    return not any(at for at, placement in zip(coordinate, tensor.placements, strict=True) if placement.is_replicate())
