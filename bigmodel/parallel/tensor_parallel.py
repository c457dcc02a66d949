"""Tensor parallelism: the matrices of a transformer sharded over processes that work on the same samples.

Source: Shoeybi et al. 2019 (arXiv 1909.08053), section 3: a matrix that is sharded by columns, followed by one sharded
by rows, needs one sum over the processes; sequence parallelism, Korthikanti et al. 2022 (arXiv 2205.05198), section
4.2.2: between such pairs, norms and residuals are sharded along the sequence, and the sum becomes a reduce-scatter and
an all-gather.

A net declares its sharding by a class attribute `tensor_plan`, which maps names of modules (with `*`) to one of:

    column      a linear layer sharded by its outputs; the module around it reads its one tensor [B, T, D] only by
                such layers
    row         a linear layer sharded by its inputs; its output is the sum over the processes
    vocabulary  an embedding sharded by its rows. The net's `logits(features)`, which multiplies by it or by a `head`,
                returns each process's part of the vocabulary in training, and cross-entropy is computed from the parts
    heads       a norm of single heads [B, heads, T, K], of which each process has some
    norm        a norm of [B, T, D], on parts of the sequence with sequence parallelism

Other modules are whole on every process. Numbers of heads (and key/value heads) must be divisible by the processes.

B sequences, T tokens, D width, K head size.
"""

from __future__ import annotations

import fnmatch
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)


def tensor_parallel(net: nn.Module, mesh: DeviceMesh, sequence_parallel: bool = False) -> None:
    """Shard a net over the processes of a mesh of one dimension, in place.

    Args:
        net: has a `tensor_plan`, see above. May be on the meta device.
        mesh: the processes that share the net.
        sequence_parallel: in training, shard the residual stream between blocks along the sequence: saved activations
            become smaller, communication stays the same. Needs `blocks` that map [B, T, D] to [B, T, D], and T
            divisible by the processes.

    Raises:
        ValueError: for a net without a plan, parameters that no plan covers, outputs or heads that are not divisible,
            and dropout with `sequence_parallel`.
    """
    plan = _checked_plan(net, mesh.size(), sequence_parallel)
    stream = _Stream(mesh)
    roles = {path: _role(path, plan) for path, module in net.named_modules() if path}
    for path, role in roles.items():
        module = net.get_submodule(path)
        if role is not None:
            _check(path, role, module, mesh.size())
            parallelize_module(module, mesh, _style(role, module, stream))
        elif any(True for _ in module.parameters(recurse=False)):
            parallelize_module(module, mesh, _Whole())
    for path in {path.rpartition(".")[0] for path, role in roles.items() if role == "column"}:
        net.get_submodule(path).register_forward_pre_hook(stream.whole)
    if sequence_parallel:
        blocks: Any = net.blocks
        blocks[0].register_forward_pre_hook(stream.shard)
        blocks[-1].register_forward_hook(stream.gather)
    if "vocabulary" in roles.values() and hasattr(net, "logits"):
        _shard_logits(net, mesh)


def _checked_plan(net: nn.Module, num_processes: int, sequence_parallel: bool) -> dict[str, str]:
    """Return the net's `tensor_plan`; raise if the net cannot be sharded by it."""
    plan: dict[str, str] | None = getattr(net, "tensor_plan", None)
    name = type(net).__name__
    if plan is None:
        raise ValueError(
            f"{name} has no attribute `tensor_plan`, which tensor parallelism needs: set"
            " --trainer.strategy.tensor_parallel_size 1 (sharding alone needs none), or add one (see"
            " `bigmodel.parallel.tensor_parallel`)"
        )
    own = [key for key, _ in net.named_parameters(recurse=False)]
    if own:
        raise ValueError(
            f"{name} has parameters that are not in a submodule ({', '.join(own)}), which a tensor plan cannot shard"
        )
    heads = getattr(net, "num_kv_heads", None)
    if heads is not None and heads % num_processes:
        raise ValueError(
            f"{heads} key/value heads are not divisible by {num_processes} processes: set"
            f" --trainer.strategy.tensor_parallel_size to a divisor of {heads}, or another --model.net.num_kv_heads"
        )
    if sequence_parallel:
        if not isinstance(getattr(net, "blocks", None), nn.ModuleList):
            raise ValueError(
                f"{name} has no `blocks`, which sequence parallelism needs: set --trainer.strategy.sequence_parallel false"
            )
        if any(isinstance(part, nn.Dropout) and part.p > 0 for part in net.modules()):
            raise ValueError(
                "with sequence parallelism, dropout would draw the same mask for each part of the sequence: set"
                " --model.net.dropout 0 or --trainer.strategy.sequence_parallel false"
            )
    return plan


def _role(path: str, plan: dict[str, str]) -> str | None:
    return next((role for pattern, role in plan.items() if fnmatch.fnmatch(path, pattern)), None)


def _check(path: str, role: str, module: nn.Module, size: int) -> None:
    """Raise for sizes that are not divisible; a vocabulary can be sharded unevenly."""
    count, what = 1 << 62, ""
    if role == "column" and isinstance(module, nn.Linear):
        count, what = module.out_features, "outputs"
    elif role == "row" and isinstance(module, nn.Linear):
        count, what = module.in_features, "inputs"
    if what and count % size:
        raise ValueError(
            f"{path} has {count} {what}, which are not divisible by {size} processes: set"
            " --trainer.strategy.tensor_parallel_size to a divisor"
        )


def _style(role: str, module: nn.Module, stream: _Stream) -> ParallelStyle:
    if role == "column":
        return ColwiseParallel()
    if role == "row":
        return _Row(stream)
    if role == "vocabulary" and isinstance(module, nn.Embedding):
        return RowwiseParallel(input_layouts=Replicate())
    if role == "vocabulary":  # the head, whose output stays sharded
        return ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    if role == "heads":
        return SequenceParallel(sequence_dim=1, use_local_output=True)  # the sharded dimension is that of the heads
    if role == "norm":
        return _Whole(stream)
    raise ValueError(f"tensor_plan: {role!r} column, row, vocabulary, heads or norm is accepted")


class _Stream:
    """Residual stream [B, T, D] between attention and MLP: whole, or in equal parts of the sequence."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.placement: Placement = Replicate()

    def shard(self, module: nn.Module, inputs: Any) -> Any:
        """Shard the input of the first block; only with gradients, since inference may process one token at a time."""
        self.placement = Shard(1) if torch.is_grad_enabled() else Replicate()
        length, size = inputs[0].shape[1], self.mesh.size()
        if self.placement.is_shard() and length % size:
            raise ValueError(
                f"with sequence parallelism, sequences of {length} tokens must be divisible by {size} processes: set"
                " --data.context_length to a multiple, or --trainer.strategy.sequence_parallel false"
            )
        return (self.redistribute_plain(inputs[0], Replicate(), self.placement).to_local(), *inputs[1:])

    def whole(self, module: nn.Module, inputs: Any) -> Any:
        """Gather the input of attention or MLP as one DTensor, so that gradients of all its readers are summed once."""
        return (self.redistribute_plain(inputs[0], self.placement, Replicate()), *inputs[1:])

    def gather(self, module: nn.Module, inputs: Any, output: Tensor) -> Any:
        """Gather the output of the last block."""
        return self.redistribute_plain(output, self.placement, Replicate()).to_local()

    def redistribute_plain(self, x: Tensor, source: Placement, target: Placement) -> Any:
        return _wrap(x, self.mesh, source).redistribute(placements=[target])


class _Row(RowwiseParallel):
    """Linear layer sharded by its inputs, whose sum has the layout of the residual stream."""

    def __init__(self, stream: _Stream) -> None:
        super().__init__(output_layouts=Partial(), use_local_output=False)
        self.stream = stream

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module = super()._apply(module, device_mesh)
        module.register_forward_hook(
            lambda _, __, output: output.redistribute(placements=[self.stream.placement]).to_local()
        )
        return module


class _Whole(ParallelStyle):
    """Module with whole parameters on every process, and activations in the layout of the stream, or whole."""

    def __init__(self, stream: _Stream | None = None) -> None:
        self.stream = stream

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(_: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
            placement = Replicate() if self.stream is None else self.stream.placement
            return tuple(_wrap(x, mesh, placement) for x in inputs)

        def leave(_: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
            return output.to_local()

        return distribute_module(module, device_mesh, None, enter, leave)


def _wrap(x: Any, mesh: DeviceMesh, placement: Placement) -> Any:
    """Wrap a plain tensor as the local part of a DTensor."""
    plain = isinstance(x, Tensor) and not isinstance(x, DTensor)
    return DTensor.from_local(x, mesh, [placement], run_check=False) if plain else x


def _shard_logits(net: Any, mesh: DeviceMesh) -> None:
    """Make `logits` return parts of the vocabulary in training, else all of it; `forward` always returns all."""
    logits = net.logits

    @functools.wraps(logits)
    def in_parts(features: Tensor) -> Tensor:
        parts = logits(_wrap(features, mesh, Replicate()))
        return parts if torch.is_grad_enabled() else parts.full_tensor()

    net.logits = in_parts
    net.register_forward_hook(lambda _, __, out: out.full_tensor() if isinstance(out, DTensor) else out)
