"""Tensor parallelism: the matrices of a transformer cut over processes that work on the same samples.

Source: Shoeybi et al. 2019 (arXiv 1909.08053), section 3: a matrix that is cut by columns, then one by rows, need one sum
over the processes between them; sequence parallelism, Korthikanti et al. 2022 (arXiv 2205.05198), section 4.2.2: between
the two, norms and residuals are held in parts of the sequence, and the sum becomes a reduce-scatter and an all-gather.

How a net is cut it says itself, by a class attribute `tensor_plan`, names of modules (with `*`) to one of:

    column      a linear layer cut by its outputs, inside a module that reads its one tensor [B, T, D] through such layers only
    row         a linear layer cut by its inputs; its output is the sum over the processes
    vocabulary  an embedding cut by its rows. The net's `logits(features)`, which multiplies by it or by a `head`, gives each
                process its part of the vocabulary while training, and cross-entropy is computed from the parts
    heads       a norm of single heads [B, heads, T, K], of which each process has some
    norm        a norm of [B, T, D], taken on parts of the sequence with sequence parallelism

What is not named is whole on every process. Numbers of heads (and key/value heads) must be divisible by the processes.

B sequences, T tokens, D width, K head size.
"""

from __future__ import annotations

import fnmatch
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)


def tensor_parallel(net: nn.Module, mesh: DeviceMesh, sequence_parallel: bool = False) -> None:
    """Cut a net over the processes of a mesh of one dimension, in place.

    Args:
        net: has a `tensor_plan`, see above. May be on the meta device.
        mesh: the processes that share the net.
        sequence_parallel: hold the residual stream between blocks in parts of the sequence: activations that are kept for
            the backward pass become smaller, communication stays the same. Needs `blocks` that map [B, T, D] to [B, T, D].

    Raises:
        ValueError: for a net without a plan, parameters that no plan can place, outputs or heads that cannot be dealt out,
            and dropout with `sequence_parallel`.
    """
    plan: dict[str, str] | None = getattr(net, "tensor_plan", None)
    name = type(net).__name__
    if plan is None:
        raise ValueError(
            f"{name} has no attribute `tensor_plan` that says how to cut it for tensor parallelism: set"
            " --trainer.strategy.tensor_parallel_size 1 (sharding alone needs none), or write one"
            " (`bigmodel.parallel.tensor_parallel` explains it)"
        )
    own = [key for key, _ in net.named_parameters(recurse=False)]
    if own:
        raise ValueError(f"{name} holds parameters of its own ({', '.join(own)}), which no tensor plan can place")
    heads = getattr(net, "num_kv_heads", None)
    if heads is not None and heads % mesh.size():
        raise ValueError(
            f"{heads} key/value heads cannot be dealt out to {mesh.size()} processes: set"
            f" --trainer.strategy.tensor_parallel_size to a divisor of {heads}, or another --model.net.num_kv_heads"
        )
    blocks = getattr(net, "blocks", None)
    if sequence_parallel:
        if not isinstance(blocks, nn.ModuleList):
            raise ValueError(f"{name} has no `blocks`, which sequence parallelism needs")
        if any(isinstance(part, nn.Dropout) and part.p > 0 for part in net.modules()):
            raise ValueError(
                "with sequence parallelism, dropout would draw the same mask for each part of the sequence: set"
                " --model.net.dropout 0 or --trainer.strategy.sequence_parallel false"
            )
    roles = {path: _role(path, plan) for path, module in net.named_modules() if path}
    between: Placement = Shard(1) if sequence_parallel else Replicate()  # where the residual stream is
    for path, role in roles.items():
        module = net.get_submodule(path)
        if role is not None:
            _check(path, role, module, mesh.size())
            parallelize_module(module, mesh, _style(role, module, between))
        elif any(True for _ in module.parameters(recurse=False)):
            parallelize_module(module, mesh, _Whole())
    for path in {path.rpartition(".")[0] for path, role in roles.items() if role == "column"}:
        parallelize_module(net.get_submodule(path), mesh, _Enter(between))
    if sequence_parallel:
        parallelize_module(blocks[0], mesh, _Move(before=(Replicate(), Shard(1))))
        parallelize_module(blocks[-1], mesh, _Move(after=(Shard(1), Replicate())))
    if "vocabulary" in roles.values() and hasattr(net, "logits"):
        _cut_logits(net, mesh)


def _role(path: str, plan: dict[str, str]) -> str | None:
    return next((role for pattern, role in plan.items() if fnmatch.fnmatch(path, pattern)), None)


def _check(path: str, role: str, module: nn.Module, size: int) -> None:
    """Refuse what cannot be cut evenly; a vocabulary can be cut unevenly."""
    count, what = 1 << 62, ""
    if role == "column" and isinstance(module, nn.Linear):
        count, what = module.out_features, "outputs"
    elif role == "row" and isinstance(module, nn.Linear):
        count, what = module.in_features, "inputs"
    if what and count % size:
        raise ValueError(
            f"{path} has {count} {what}, which {size} processes cannot share evenly: set"
            " --trainer.strategy.tensor_parallel_size to a divisor"
        )


def _style(role: str, module: nn.Module, between: Placement) -> ParallelStyle:
    if role == "column":
        return ColwiseParallel()
    if role == "row":
        return RowwiseParallel(output_layouts=between)
    if role == "vocabulary" and isinstance(module, nn.Embedding):
        return RowwiseParallel(input_layouts=Replicate())
    if role == "vocabulary":  # the head, whose output stays in parts
        return ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    if role == "heads":
        return SequenceParallel(sequence_dim=1, use_local_output=True)  # the dimension that is cut is that of the heads
    if role == "norm":
        return _Whole() if between.is_replicate() else SequenceParallel(use_local_output=True)
    raise ValueError(f"tensor_plan: {role!r} is none of column, row, vocabulary, heads, norm")


class _Whole(ParallelStyle):
    """A module whose parameters and activations are the same on every process."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(_: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
            return tuple(_wrap(x, mesh, Replicate()) for x in inputs)

        def leave(_: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
            return output.to_local()

        return distribute_module(module, device_mesh, None, enter, leave)


class _Enter(ParallelStyle):
    """The tensor that a module's `column` layers read, made whole once for all of them: one sum of its gradients."""

    def __init__(self, source: Placement) -> None:
        self.source = source

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(_: nn.Module, inputs: Any) -> Any:
            first = _wrap(inputs[0], device_mesh, self.source).redistribute(placements=[Replicate()])
            return (first, *inputs[1:])

        module.register_forward_pre_hook(enter)
        return module


class _Move(ParallelStyle):
    """A module's first input, or its output, laid out anew: from one placement to another."""

    def __init__(
        self, before: tuple[Placement, Placement] | None = None, after: tuple[Placement, Placement] | None = None
    ) -> None:
        self.before, self.after = before, after

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def move(x: Tensor, way: tuple[Placement, Placement]) -> Tensor:
            return _wrap(x, device_mesh, way[0]).redistribute(placements=[way[1]]).to_local()

        if before := self.before:
            module.register_forward_pre_hook(lambda _, inputs: (move(inputs[0], before), *inputs[1:]))
        if after := self.after:
            module.register_forward_hook(lambda _, __, output: move(output, after))
        return module


def _wrap(x: Any, mesh: DeviceMesh, placement: Placement) -> Any:
    """A plain tensor as the DTensor that it is a part of."""
    plain = isinstance(x, Tensor) and not isinstance(x, DTensor)
    return DTensor.from_local(x, mesh, [placement], run_check=False) if plain else x


def _cut_logits(net: Any, mesh: DeviceMesh) -> None:
    """`logits` in parts of the vocabulary while training, whole otherwise; what `forward` gives is always whole."""
    logits = net.logits

    @functools.wraps(logits)
    def in_parts(features: Tensor) -> Tensor:
        parts = logits(_wrap(features, mesh, Replicate()))
        return parts if torch.is_grad_enabled() else parts.full_tensor()

    net.logits = in_parts
    net.register_forward_hook(lambda _, __, out: out.full_tensor() if isinstance(out, DTensor) else out)
