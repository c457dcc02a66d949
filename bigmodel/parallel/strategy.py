"""Strategy for nets, gradients and optimizer state sharded over processes: FSDP2, tensor parallelism, or both.

Sources: Zhao et al. 2023 (arXiv 2304.11277) for fully sharded data parallelism and hybrid sharding; torch's
`fully_shard`.

The processes form a mesh [replicas, shards, tensor]. Processes that differ in `tensor` work on the same samples, each
on its part of every matrix. Those that differ in `shards` hold different parts of parameters, gradients and optimizer
state, and gather a block's parameters when it is computed. `replicas` are whole copies of all that, between which
gradients are averaged, for example one on each machine, so that only gradients cross the slow links.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import logging
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torchmetrics import Metric

from bigmodel.checkpoint import AtomicCheckpointIO, LazyShardedTensor, distribute_like
from bigmodel.internals import check_backend_hook, connect_processes, flatten_mesh, is_persistent, set_device_mesh
from bigmodel.parallel.blocks import find_blocks, trained_task
from bigmodel.parallel.deferred import Initialization, deferred
from bigmodel.parallel.tensor_parallel import tensor_parallel

_Result = TypeVar("_Result")
_STEPS = ("training_step", "validation_step", "test_step", "predict_step")
check_backend_hook(ModelParallelStrategy)


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 block by block, with optional tensor parallelism; for any task that creates its net in `configure_model`.

    Each of the net's blocks (`bigmodel.parallel.find_blocks`) is sharded as a unit; parameters outside blocks are
    gathered once a step. With `bf16-mixed`, parameters are gathered in bfloat16 (in float32 if there is BatchNorm) and
    gradients reduced in float32; the sharded parameters and the optimizer's state stay float32. A step of one process
    and of many agree up to rounding, and initial weights bitwise.

    Args:
        num_replicas: whole copies of the sharded model (hybrid sharding); `nodes`: one on each machine; 1: sharded over
            all.
        tensor_parallel_size: processes that share each matrix, on the same machine, and work on the same samples.
        sequence_parallel: with tensor parallelism, shard activations between attention and MLP along the sequence.
        reshard_after_forward: free a block's gathered parameters after its forward pass and gather them again for the
            backward pass: less memory, half as much communication again.
        cpu_offload: hold parameters, gradients and optimizer state in the host's memory; optimizer steps run there.
        reduce_each_micro_batch: reduce gradients after each micro-batch, so that no device holds whole ones while it
            accumulates; by default once an optimizer step.
        deferred_init: create the net without memory, and its initial weights one parameter at a time, so that a model
            larger than a device, or than the host's memory, can start.
        sharded_checkpoints: each process writes its own part, into a folder; false: the first process writes all in a
            file.
        timeout_minutes: the timeout of collective operations.
    """

    def __init__(
        self,
        num_replicas: int | Literal["nodes"] = 1,
        tensor_parallel_size: int = 1,
        sequence_parallel: bool = False,
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        reduce_each_micro_batch: bool = False,
        deferred_init: bool = True,
        sharded_checkpoints: bool = True,
        timeout_minutes: float = 30.0,
    ) -> None:
        super().__init__(
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=sharded_checkpoints,
            timeout=timedelta(minutes=timeout_minutes),
        )
        for name, value in (("num_replicas", num_replicas), ("tensor_parallel_size", tensor_parallel_size)):
            if isinstance(value, int) and value < 1:
                raise ValueError(f"--trainer.strategy.{name} {value} must be at least 1")
        if sequence_parallel and tensor_parallel_size == 1:
            raise ValueError(
                "--trainer.strategy.sequence_parallel true needs --trainer.strategy.tensor_parallel_size above 1"
            )
        self.num_replicas, self.tensor_size = num_replicas, tensor_parallel_size
        self.sequence_parallel = sequence_parallel
        self.reshard_after_forward = reshard_after_forward
        self.cpu_offload = cpu_offload
        self.reduce_each_micro_batch = reduce_each_micro_batch
        self.deferred_init = deferred_init
        self.sharded_checkpoints = sharded_checkpoints
        self._initial: Initialization | None = None
        self._loss_parallel: AbstractContextManager[None] = nullcontext()

    # Processes

    def setup_environment(self) -> None:
        connect_processes(self)
        atexit.register(_destroy_process_group)
        replicas = self.num_nodes if self.num_replicas == "nodes" else self.num_replicas
        shards, rest = divmod(self.world_size, replicas * self.tensor_size)
        if rest or not shards:
            raise ValueError(
                f"{self.world_size} process(es) are not divisible by --trainer.strategy.num_replicas {replicas} x"
                f" tensor_parallel_size {self.tensor_size}: change these, or --trainer.devices and --trainer.num_nodes"
            )
        names = ("replicas", "data_parallel", "tensor_parallel")
        sizes = (replicas, shards, self.tensor_size)
        set_device_mesh(self, init_device_mesh(self.root_device.type, sizes, mesh_dim_names=names))

    def _get_process_group_backend(self) -> str:
        backend = super()._get_process_group_backend()
        return "cpu:gloo,cuda:nccl" if self.cpu_offload and backend == "nccl" else backend

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Arguments of the sampler: processes that share matrices take the same samples."""
        return {"num_replicas": self.world_size // self.tensor_size, "rank": self.global_rank // self.tensor_size}

    # The net

    @contextmanager
    def model_sharded_context(self) -> Generator[None, None, None]:
        if not self.deferred_init:
            yield
            return
        assert self.lightning_module is not None
        # A checkpoint's weights replace drawn ones, except for any that it lacks.
        draw = self.lightning_module.trainer.ckpt_path is None or not self.lightning_module.strict_loading
        with deferred(draw=draw) as self._initial:
            yield

    def setup(self, trainer: Trainer) -> None:
        module = self.lightning_module
        assert module is not None
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        if hasattr(self.precision_plugin, "decide"):  # not chosen yet; sets the type of gathering
            self.precision_plugin.decide(trainer)
        if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):  # a task may shard by itself
            self._apply_parallelism(module)
        if self._initial is not None:
            self._initial.materialize(module, self._storage_device)
            self._initial = None
        self.model = self.precision_plugin.convert_module(module)
        self.model_to_device()
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    @property
    def _storage_device(self) -> torch.device:
        return torch.device("cpu") if self.cpu_offload else self.root_device

    def _apply_parallelism(self, module: LightningModule) -> None:
        mesh = self.device_mesh
        if self.tensor_size > 1:
            for net in _nets(module):
                tensor_parallel(net, mesh["tensor_parallel"], self.sequence_parallel)
            # Tensor parallelism returns views, which are never written to; gathers along two dimensions are rare.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
            self._loss_parallel = loss_parallel()
            self._loss_parallel.__enter__()
        options: dict[str, Any] = {
            "mesh": mesh["replicas", "data_parallel"] if mesh["replicas"].size() > 1 else mesh["data_parallel"],
            "mp_policy": self._precision_policy(module),
        }
        if self.cpu_offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda")
        for parameter in module.parameters():  # FSDP2 accepts only contiguous parameters, not channels_last
            if not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()
        blocks = find_blocks(module)
        for i, (_, block) in enumerate(blocks):
            # The last block's backward pass comes right after its forward pass.
            again = self.reshard_after_forward and i + 1 < len(blocks)
            fully_shard(block, reshard_after_forward=again, **options)
        # The task is the root: parameters outside of blocks are whole only in its steps.
        fully_shard(module, **options)
        root: Any = module
        root._run_as_step = lambda function: function()
        register_fsdp_forward_method(module, "_run_as_step")
        for name in _STEPS:
            if is_overridden(name, module):
                setattr(module, name, _as_forward(getattr(module, name), root._run_as_step))
        group = flatten_mesh(mesh["replicas", "data_parallel"], "replicas_data_parallel").get_group()
        for part in module.modules():
            if isinstance(part, Metric) and part.process_group is None:
                part.process_group = group  # the processes with different samples

    def _precision_policy(self, module: LightningModule) -> MixedPrecisionPolicy:
        # Inputs are cast by autocast, which leaves float32 where needed (labels, weights of rows, losses). BatchNorm's
        # weights must have its statistics' type: such nets, which are small, are gathered in float32.
        whole = any(isinstance(part, _BatchNorm) for part in module.modules())
        if isinstance(self.precision_plugin, MixedPrecision) and not whole:
            return MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        if isinstance(self.precision_plugin, HalfPrecision):
            return MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        return MixedPrecisionPolicy(cast_forward_inputs=False)

    def model_to_device(self) -> None:
        if not self.cpu_offload:
            super().model_to_device()
            return
        assert self.model is not None
        for part in self.model.modules():
            for name, buffer in part.named_buffers(recurse=False):
                part.register_buffer(name, buffer.to(self.root_device), is_persistent(part, name))

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Store whole float32 gradients on each process while accumulating."""
        root = self._root()
        if root is None or self.reduce_each_micro_batch:
            yield
            return
        root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            root.set_requires_gradient_sync(True)

    def _root(self) -> FSDPModule | None:
        return self.model if isinstance(self.model, FSDPModule) else None

    def _evaluate(self, step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            return step(*args, **kwargs)
        finally:
            if (root := self._root()) is not None:
                root.reshard()  # else it stays gathered until a backward pass

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate(super().validation_step, args, kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate(super().test_step, args, kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate(super().predict_step, args, kwargs)

    def run_as_step(self, function: Callable[[], _Result]) -> _Result:
        """Call a function that uses the net outside of the task's steps; must be called by all processes."""
        with torch.no_grad(), self.precision_plugin.forward_context():
            if self._root() is None:
                return function()
            run: Any = self.lightning_module
            return self._evaluate(run._run_as_step, (function,), {})

    def teardown(self) -> None:
        self._loss_parallel.__exit__(None, None, None)
        self._loss_parallel = nullcontext()
        super().teardown()

    # Checkpoints: the same tree as on one process, with DTensors for sharded tensors

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return (optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        path = Path(self.broadcast(str(filepath)))
        if not self.sharded_checkpoints:
            checkpoint = _map(checkpoint, _gathered)
            if not self.is_global_zero:
                return
        self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        assert isinstance(self.checkpoint_io, AtomicCheckpointIO)
        assert self.lightning_module is not None
        checkpoint = self.checkpoint_io.load_checkpoint(checkpoint_path, whole=False)
        own = dict(self.lightning_module.named_parameters())
        # A callback's tensor under a parameter's name is sharded like the parameter.
        checkpoint["callbacks"] = _placed_by_name(checkpoint.get("callbacks", {}), own)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        found = checkpoint["state_dict"]
        for name in own.keys() & found.keys():
            if found[name].shape != own[name].shape:
                raise RuntimeError(
                    f"Error(s) in loading state_dict: {name} has the shape {tuple(found[name].shape)} in the checkpoint, and"
                    f" {tuple(own[name].shape)} in the model"
                )
        placed = {name: distribute_like(leaf, own[name]) if name in own else leaf for name, leaf in found.items()}
        self.lightning_module.load_state_dict(placed, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                number: {key: _placed(leaf, parameters[number]) for key, leaf in values.items()}
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def _destroy_process_group() -> None:
    """Destroy the process group before the interpreter exits: gloo's threads would abort the process later."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _as_forward(step: Callable[..., Any], run: Callable[[Callable[[], Any]], Any]) -> Callable[..., Any]:
    """Wrap a task's step so that FSDP2 treats it as the root's forward pass."""

    @functools.wraps(step)
    def in_forward(*args: Any, **kwargs: Any) -> Any:
        return run(lambda: step(*args, **kwargs))

    in_forward.__wrapped__ = inspect.unwrap(step)  # Lightning inspects its arguments
    return in_forward


def _nets(module: LightningModule) -> list[nn.Module]:
    """Return a task's child modules with parameters."""
    return [child for child in trained_task(module).children() if any(True for _ in child.parameters())]


def _map(tree: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(tree, dict):
        return {key: _map(value, function) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_map(value, function) for value in tree)
    return function(tree)


def _gathered(leaf: Any) -> Any:
    """Return a DTensor whole on the CPU, so that no device holds more than one whole tensor at a time."""
    return leaf.full_tensor().cpu() if isinstance(leaf, DTensor) else leaf


def _placed(leaf: Any, like: Tensor | None) -> Any:
    """Return a parameter's tensor in the parameter's layout; any other sharded tensor whole."""
    if not isinstance(leaf, Tensor | LazyShardedTensor):
        return leaf
    if like is not None and like.shape == leaf.shape:
        return distribute_like(leaf, like)
    return leaf.whole() if isinstance(leaf, LazyShardedTensor) else leaf


def _placed_by_name(tree: Any, own: Mapping[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {
        key: _placed_by_name(value, own)
        if isinstance(value, dict)
        else _placed(value, own.get(key) if isinstance(key, str) else None)
        for key, value in tree.items()
    }
