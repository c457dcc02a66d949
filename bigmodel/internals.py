"""Undocumented attributes, hooks and state keys of Lightning, torch and other libraries: all that this package uses.

A new version of a library may rename any of them without notice. Each is checked when it is used, or, if it is listed
in `CHECKED`, when this module is imported; the error names the attribute, its purpose, and the version it was read in.
Private names that are imported (`from torch.utils._pytree import ...`) need no check: the import fails.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle

READ_IN = {  # the versions whose source was read
    "lightning": "2.6.6",
    "torch": "2.13.0",
    "jsonargparse": "4.53.0",
    "transformers": "5.23.0",
    "datasets": "5.2.0",
}


class MissingInternal(RuntimeError):
    """A library no longer has an undocumented attribute that bigmodel uses."""

    def __init__(self, package: str, name: str, purpose: str) -> None:
        self.package, self.name = package, name
        super().__init__(
            f"{package} {version(package)} has no `{name}`, which bigmodel uses to {purpose}: install {package}"
            f" {READ_IN[package]}, in which it was read, or adapt bigmodel/internals.py"
        )


def _get(owner: Any, name: str, purpose: str) -> Any:
    """Return an undocumented attribute of an object, a class or a module."""
    if hasattr(owner, name):
        return getattr(owner, name)
    kind = owner if isinstance(owner, type) else type(owner)
    packages = [("" if isinstance(owner, ModuleType) else f"{c.__name__}.", c.__module__) for c in kind.__mro__]
    if isinstance(owner, ModuleType):
        packages = [(f"{owner.__name__}.", owner.__name__)]
    known = [(label, module.split(".")[0]) for label, module in packages if module.split(".")[0] in READ_IN]
    label, package = known[0]
    raise MissingInternal(package, f"{label}{name}", purpose)


# Used in place, some of them several times a step.
_aten: Any = torch.ops.aten
CHECKED = [
    (torch, "_foreach_lerp_", "average weights"),
    (torch, "_foreach_mul_", "scale gradients"),
    (torch, "_foreach_norm", "compute the norm of gradients"),
    (torch, "_foreach_copy_", "copy weights"),
    (torch.Tensor, "_version", "detect changes in place"),
    (torch.Tensor, "_make_subclass", "create parameters without memory"),
    (torch.UntypedStorage, "_cdata", "identify the memory of tensors"),
    (torch.UntypedStorage, "_new_with_weak_ptr", "write recorded initial values"),
    (torch._C, "_current_graph_task_id", "recognize a recomputed forward pass"),
    (torch._C, "_has_storage", "identify the memory of tensors"),
    (_aten, "_to_copy", "record initial weights"),
    (_aten, "_scaled_dot_product_flash_attention_for_cpu", "count FLOPs"),
    (_aten, "_scaled_dot_product_flash_attention_for_cpu_backward", "count FLOPs"),
    (_aten.clone.default, "_schema", "recognize operations that write"),
    (_aten.clone.default, "_overloadpacket", "recognize operations"),
    (nn.Module, "_apply", "move modules to another type and device"),
    (ParallelStyle, "_apply", "shard layers for tensor parallelism"),
    (nn.Module(), "_buffers", "replace buffers"),
    (nn.Module(), "_modules", "copy modules"),
    (nn.Module(), "_parameters", "replace parameters"),
    (nn.Embedding, "_fill_padding_idx_with_zero", "initialize the embedding of padding"),
    (nn.init, "_no_grad_trunc_normal_", "record initial weights"),
    (nn.modules.batchnorm, "_BatchNorm", "recognize batch normalization"),
    (nn.modules.batchnorm, "_NormBase", "recognize normalization with running statistics"),
]
for _owner, _name, _purpose in CHECKED:
    _get(_owner, _name, _purpose)


# Lightning: the training loop


def validation_due(trainer: Any) -> bool:
    """True if validation follows the optimizer step just taken."""
    purpose = "save a checkpoint after the validation that is due at its step"
    epoch, fetcher = trainer.fit_loop.epoch_loop, _get(trainer.fit_loop, "_data_fetcher", purpose)
    check = _get(epoch, "_should_check_val_fx", purpose)
    return fetcher is not None and bool(check(fetcher)) and not epoch.val_loop.skip


def stops_here(trainer: Any) -> bool:
    """True if the run is about to end by `trainer.should_stop`."""
    can_stop = _get(trainer.fit_loop, "_can_stop_early", "recognize a run that ends anyway when it is preempted")
    return bool(trainer.should_stop and can_stop)


def _signal_hooks(trainer: Any) -> list[tuple[Any, str]]:
    purpose = "replace Lightning's handling of signals"
    hooks = [
        (_get(trainer, "_signal_connector", purpose), "register_signal_handlers"),
        (trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor"),
    ]
    for owner, name in hooks:
        _get(owner, name, purpose)
    return hooks


def disable_signal_handling(trainer: Any) -> None:
    """Disable Lightning's handlers of signals, and its exchange of SIGTERM between processes on each micro-batch."""
    for owner, name in _signal_hooks(trainer):
        setattr(owner, name, lambda: None)


def restore_signal_handling(trainer: Any) -> None:
    """Undo `disable_signal_handling`."""
    for owner, name in _signal_hooks(trainer):
        owner.__dict__.pop(name, None)


def before_fetch(trainer: Any, act: Callable[[], None]) -> Callable[[], None]:
    """Call `act` before each training batch is fetched; return a function that ends this."""
    loop = trainer.fit_loop.epoch_loop
    profile = _get(loop, "_on_before_fetch", "measure the time spent on data")

    def fetching() -> None:
        act()
        profile()

    loop._on_before_fetch = fetching
    return lambda: delattr(loop, "_on_before_fetch")


def set_result_class(trainer: Any, result_class: Any) -> Callable[[], None]:
    """Let Lightning convert what `training_step` returns by another class than its own; return a function that ends this."""
    loop = trainer.fit_loop.epoch_loop.automatic_optimization
    _get(loop, "output_result_cls", "record the loss and the count of each micro-batch")
    loop.output_result_cls = result_class
    return lambda: delattr(loop, "output_result_cls")


def divides_samples(trainer: Any) -> bool:
    """True if Lightning divides the samples of ordinary loaders among several processes."""
    connector = _get(trainer, "_accelerator_connector", "compute the length of an epoch")
    return trainer.world_size > 1 and bool(_get(connector, "use_distributed_sampler", "compute the length of an epoch"))


def limit_to_one_step(trainer: Any) -> None:
    """End training after one optimizer step."""
    _get(trainer.fit_loop.epoch_loop, "max_steps", "end a run after one optimizer step")
    trainer.fit_loop.epoch_loop.max_steps = 1


def clear_minimum(trainer: Any) -> None:
    """Let `trainer.should_stop` end training at any step."""
    for loop, name in ((trainer.fit_loop, "min_epochs"), (trainer.fit_loop.epoch_loop, "min_steps")):
        _get(loop, name, "end a run after a few steps")
        setattr(loop, name, None)


def skip_hook(callback: Any, hook: str) -> None:
    """Save Lightning the call of a callback's hook that does nothing: it calls only what is callable."""
    from lightning.pytorch.trainer import call

    purpose = "skip callbacks that do nothing in a step"
    if "if callable(fn):" not in inspect.getsource(_get(call, "_call_callback_hooks", purpose)):
        raise MissingInternal("lightning", "_call_callback_hooks: if callable(fn)", purpose)
    setattr(callback, hook, None)


def progress_of(fit_loop_state: dict[str, Any], name: str) -> dict[str, Any]:
    """Return one of the counters in the fit loop's state in a checkpoint, to be changed in place."""
    purpose = "resume on another number of processes"
    progress: dict[str, Any] = _entry(fit_loop_state, name, purpose)
    for part in ("current", "total"):
        for key in ("ready", "started", "processed", "completed"):
            _entry(_entry(progress, part, purpose), key, purpose)
    return progress


def _entry(state: Mapping[str, Any], key: str, purpose: str) -> Any:
    if key not in state:
        raise MissingInternal("lightning", key, purpose)
    return state[key]


# Lightning: modules, callbacks, loggers, profilers


def attached_trainer(module: Any) -> Any:
    """Return the trainer that a LightningModule is attached to; None if there is none."""
    try:
        return module.trainer
    except RuntimeError:
        return None


def prepare_batch(module: Any, batch: Any) -> Any:
    """Return the batch after the hook `on_before_batch_transfer` of the task or its data module."""
    return _get(module, "_on_before_batch_transfer", "prepare a batch as in a training step")(batch)


def stop_after_validation(early_stopping: Any, after_validation: bool) -> None:
    """Set when EarlyStopping checks its metric, unless a person has set it: after a validation, or at an epoch's end."""
    name = "_check_on_train_epoch_end"
    if _get(early_stopping, name, "let a checkpoint include the state of EarlyStopping after a validation") is None:
        setattr(early_stopping, name, not after_validation)


def save_triggers(checkpoint: Any) -> tuple[int | None, float | None]:
    """Return the steps and the seconds between two saves of Lightning's ModelCheckpoint, where they are set."""
    purpose = "estimate the number of checkpoints in a run"
    interval = _get(checkpoint, "_train_time_interval", purpose)
    return _get(checkpoint, "_every_n_train_steps", purpose), interval and interval.total_seconds()


def drop_init_argument(logger: Any, name: str) -> None:
    """Remove an argument that Lightning's WandbLogger passes to `wandb.init`."""
    _get(logger, "_wandb_init", "remove an argument that W&B warns about").pop(name, None)


def profiled_module(profiler: Any) -> nn.Module:
    """Return the LightningModule that the trainer has set in a profiler."""
    module: nn.Module = _get(profiler, "_lightning_module", "name the modules in a trace")
    return module


# Lightning: processes


def start_method(strategy: Any) -> str:
    """Return how a strategy starts processes: `popen`, or one of multiprocessing's methods."""
    from lightning.pytorch.strategies import DDPStrategy

    if not isinstance(strategy, DDPStrategy):
        return "popen"
    return str(_get(strategy, "_start_method", "refuse processes that are not started by a command"))


def connect_processes(strategy: Any) -> None:
    """Create the process group of a ModelParallelStrategy."""
    _get(strategy, "_setup_distributed", "connect the processes before their mesh is made")()


def set_device_mesh(strategy: Any, mesh: Any) -> None:
    """Set the mesh of a ModelParallelStrategy and its task in place of Lightning's own, which has two dimensions."""
    for owner in (strategy, strategy.lightning_module):
        _get(owner, "_device_mesh", "shard over replicas, shards and tensor parallelism")
        owner._device_mesh = mesh


def check_backend_hook(strategy_class: type) -> None:
    """Check that Lightning asks a strategy for its backend by the method that `ShardedStrategy` overrides."""
    _get(strategy_class, "_get_process_group_backend", "communicate on CPU and GPU with cpu_offload")


# torch


def compiled_in_place(module: nn.Module) -> bool:
    """True if `module.compile()` was called."""
    return _get(module, "_compiled_call_impl", "recognize compiled modules") is not None


def undo_compile(module: nn.Module) -> None:
    """Undo `module.compile()`."""
    compiled_in_place(module)
    module._compiled_call_impl = None


def dynamo() -> Any:
    """Import `torch._dynamo`, which takes a second."""
    import torch._dynamo

    for name in ("counters", "get_compilation_metrics", "set_compilation_metrics_limit", "clear_compilation_metrics"):
        _get(torch._dynamo.utils, name, "count compilations")
    _get(torch._dynamo.config, "recompile_limit", "compile blocks that differ in a constant")
    return torch._dynamo


def cpp_compilers() -> Sequence[str | None] | str:
    """Return the C++ compilers that torch.compile tries."""
    from torch._inductor import config

    names: Sequence[str | None] | str = _get(config.cpp, "cxx", "find a missing compiler before training")
    return names


def local_part(tensor: DTensor) -> Tensor:
    """Return this process's part of a DTensor, sharing its memory, without autograd."""
    part: Tensor = _get(tensor, "_local_tensor", "operate on local parts of sharded tensors")
    return part


def flatten_mesh(mesh: Any, name: str) -> Any:
    """Return the mesh of one dimension with the same processes."""
    return _get(mesh, "_flatten", "gather metrics over all processes with different samples")(name)


def is_persistent(module: nn.Module, buffer: str) -> bool:
    """True if a buffer is saved in the module's state dict."""
    return buffer not in _get(module, "_non_persistent_buffers_set", "move buffers to another device")


def shared_storage(num_bytes: int) -> torch.UntypedStorage:
    """Allocate memory that is shared with other processes."""
    new = _get(torch.UntypedStorage, "_new_shared", "pass batches from workers without a copy")
    storage: torch.UntypedStorage = new(num_bytes)
    return storage


def set_scheduler_position(scheduler: Any, step: int, step_count: int, rates: list[Any]) -> None:
    """Set the position of a learning-rate scheduler, and the rates that it has set."""
    for name in ("_step_count", "_last_lr"):
        _get(scheduler, name, "continue a schedule")
    scheduler.last_epoch, scheduler._step_count, scheduler._last_lr = step, step_count, rates


def disable_fused(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer that was created with `fused` take ordinary steps."""
    if type(optimizer).__module__.startswith("torch."):
        _get(optimizer, "_step_supports_amp_scaling", "replace a fused optimizer that torch lacks for these parameters")
    for group in (optimizer.defaults, *optimizer.param_groups):
        group["fused"] = False
    for name in ("_step_supports_amp_scaling", "_need_device_dtype_check_for_fused"):
        if hasattr(optimizer, name):
            setattr(optimizer, name, False)


# Other libraries


def parsing_settings() -> dict[str, Any]:
    """Return jsonargparse's global settings, to be saved and restored."""
    from jsonargparse import _common

    settings: dict[str, Any] = _get(_common, "parsing_settings", "restrict imports while a run is loaded")
    return settings


def cached_file(path: str, name: str, *, required: bool, online: bool = True) -> str | None:
    """Return the path of a model's file, local or from the Hugging Face Hub.

    Args:
        path: the model, a folder or a name on the hub.
        name: of the file.
        required: raise if the model has no such file; else return None.
        online: raise if the hub cannot be reached; else return None.
    """
    from transformers.utils import hub

    options = {"_raise_exceptions_for_missing_entries": required, "_raise_exceptions_for_connection_errors": online}
    for option in options.keys() - inspect.signature(hub.cached_files).parameters.keys():
        raise MissingInternal("transformers", option, "look for files that a model may lack")
    file: str | None = hub.cached_file(path, name, **options)
    return file


def fingerprint(dataset: Any) -> str:
    """Return the fingerprint of a Hugging Face dataset's content."""
    return str(_get(dataset, "_fingerprint", "recognize changed data"))
