"""Tensor parallelism: the matrices of a transformer cut over processes that work on the same samples.

Source: Shoeybi et al. 2019 (arXiv 1909.08053), section 3: a matrix that is cut by columns, then one by rows, need one sum
over the processes between them; sequence parallelism, Korthikanti et al. 2022 (arXiv 2205.05198), section 4.2.2: between
the two, norms and residuals are held in parts of the sequence, and the sum becomes a reduce-scatter and an all-gather.

How a net is cut it says itself, by a class attribute `tensor_plan`, names of modules (with `*`) to one of:

    column      a linear layer cut by its outputs; the module around it reads its one tensor [B, T, D] by such layers only
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
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module
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
        sequence_parallel: while training, hold the residual stream between blocks in parts of the sequence: activations
            that are kept for the backward pass become smaller, communication stays the same. Needs `blocks` that map
            [B, T, D] to [B, T, D], and T divisible by the processes.

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
    blocks: Any = getattr(net, "blocks", None)
    if sequence_parallel:
        if not isinstance(blocks, nn.ModuleList):
            raise ValueError(f"{name} has no `blocks`, which sequence parallelism needs")
        if any(isinstance(part, nn.Dropout) and part.p > 0 for part in net.modules()):
            raise ValueError(
                "with sequence parallelism, dropout would draw the same mask for each part of the sequence: set"
                " --model.net.dropout 0 or --trainer.strategy.sequence_parallel false"
            )
    roles = {path: _role(path, plan) for path, module in net.named_modules() if path}
    stream = _Stream(mesh)
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
        blocks[0].register_forward_pre_hook(stream.cut)
        blocks[-1].register_forward_hook(stream.gather)
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


def _style(role: str, module: nn.Module, stream: _Stream) -> ParallelStyle:
    if role == "column":
        return ColwiseParallel()
    if role == "row":
        return _Row(stream)
    if role == "vocabulary" and isinstance(module, nn.Embedding):
        return RowwiseParallel(input_layouts=Replicate())
    if role == "vocabulary":  # the head, whose output stays in parts
        return ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    if role == "heads":
        return SequenceParallel(sequence_dim=1, use_local_output=True)  # the dimension that is cut is that of the heads
    if role == "norm":
        return _Whole(stream)
    raise ValueError(f"tensor_plan: {role!r} is none of column, row, vocabulary, heads, norm")


class _Stream:
    """The residual stream [B, T, D] between attention and MLP: whole, or in equal parts of the sequence."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.placement: Placement = Replicate()

    def cut(self, module: nn.Module, inputs: Any) -> Any:
        """Before the first block. Without gradients no activations are kept, and one token at a time may be asked for."""
        self.placement = Shard(1) if torch.is_grad_enabled() else Replicate()
        length, size = inputs[0].shape[1], self.mesh.size()
        if self.placement.is_shard() and length % size:
            raise ValueError(
                f"with sequence parallelism, sequences of {length} tokens cannot be dealt out to {size} processes: set"
                " --data.context_length to a multiple, or --trainer.strategy.sequence_parallel false"
            )
        return (self.laid_out(inputs[0], Replicate(), self.placement).to_local(), *inputs[1:])

    def whole(self, module: nn.Module, inputs: Any) -> Any:
        """Before attention or MLP: as one DTensor, so that gradients of all that read it are summed once."""
        return (self.laid_out(inputs[0], self.placement, Replicate()), *inputs[1:])

    def gather(self, module: nn.Module, inputs: Any, output: Tensor) -> Any:
        """After the last block."""
        return self.laid_out(output, self.placement, Replicate()).to_local()

    def laid_out(self, x: Tensor, source: Placement, target: Placement) -> Any:
        return _wrap(x, self.mesh, source).redistribute(placements=[target])


class _Row(RowwiseParallel):
    """A linear layer cut by its inputs, whose sum goes into the residual stream as that is laid out."""

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
    """A module whose parameters are whole on every process, and its activations as the stream's, or whole."""

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
