"""Per-step operations on possibly sharded tensors: on each process's local part, without DTensor's dispatch.

An elementwise operation gives the same result on the parts as on the whole; DTensor's dispatch would take a hundred
microseconds per operation.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from bigmodel.internals import local_part


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, sharing its memory; any other tensor unchanged."""
    return local_part(tensor) if isinstance(tensor, DTensor) else tensor


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Return the 2-norm of all elements of all tensors, each counted once on any mesh.

    Returns:
        A scalar, the same on every process; float32 for tensors of lower precision.
    """
    groups: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[Tensor]] = {}
    for tensor in tensors:
        mesh: DeviceMesh | None = None
        sharded: tuple[int, ...] = ()
        if isinstance(tensor, DTensor):
            assert not any(placement.is_partial() for placement in tensor.placements), tensor.placements
            mesh = tensor.device_mesh
            sharded = tuple(i for i, placement in enumerate(tensor.placements) if not placement.is_replicate())
        groups.setdefault((mesh, sharded), []).append(local(tensor))
    if groups.keys() == {(None, ())}:
        return torch.nn.utils.get_total_norm(groups[None, ()], foreach=True)
    squares: list[Tensor] = []
    for (among, dimensions), parts in groups.items():
        square = torch.stack(torch._foreach_norm(parts, dtype=torch.float32)).square().sum()
        if among is not None:
            for dimension in dimensions:
                distributed.all_reduce(square, group=among.get_group(dimension))
        squares.append(square)
    return torch.stack(squares).sum().sqrt()
