"""Undocumented attributes of libraries: each is used through one module, and its absence is an error that names it."""

import ast
import importlib.util
from pathlib import Path

import jsonargparse
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer import call
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from bigmodel import internals
from bigmodel.internals import MissingInternal


def new_trainer():
    return Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, barebones=False
    )


def scheduler():
    return torch.optim.lr_scheduler.LambdaLR(
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0), lambda step: 1.0
    )


def epoch_loop(trainer):
    return trainer.fit_loop.epoch_loop


def strategy():
    new = ModelParallelStrategy()
    new._lightning_module = LightningModule()
    return new


def bare(kind):
    return object.__new__(kind)


# An owner, how to reach the object that has the attribute, the attribute, and its use. All others are functions of torch.
USES = [
    (new_trainer, lambda t: t.fit_loop, "_data_fetcher", internals.validation_due),
    (new_trainer, epoch_loop, "_should_check_val_fx", internals.validation_due),
    (new_trainer, lambda t: t.fit_loop, "_can_stop_early", internals.stops_here),
    (new_trainer, lambda t: t, "_signal_connector", internals.disable_signal_handling),
    (new_trainer, lambda t: t._signal_connector, "register_signal_handlers", internals.disable_signal_handling),
    (new_trainer, epoch_loop, "_broadcast_sigterm_tensor", internals.disable_signal_handling),
    (new_trainer, epoch_loop, "_broadcast_sigterm_tensor", internals.restore_signal_handling),
    (new_trainer, epoch_loop, "_on_before_fetch", lambda t: internals.before_fetch(t, print)),
    (new_trainer, lambda t: epoch_loop(t).automatic_optimization, "output_result_cls",
     lambda t: internals.set_result_class(t, dict)),
    (new_trainer, lambda t: t, "_accelerator_connector", internals.divides_samples),
    (new_trainer, epoch_loop, "max_steps", internals.limit_to_one_step),
    (new_trainer, lambda t: t.fit_loop, "min_epochs", internals.clear_minimum),
    (new_trainer, epoch_loop, "min_steps", internals.clear_minimum),
    (lambda: Callback, lambda _: call, "_call_callback_hooks", lambda c: internals.skip_hook(c, "on_fit_start")),
    (LightningModule, lambda m: m, "_on_before_batch_transfer", lambda m: internals.prepare_batch(m, 0)),
    (lambda: EarlyStopping("val/loss"), lambda c: c, "_check_on_train_epoch_end",
     lambda c: internals.stop_after_validation(c, True)),
    (ModelCheckpoint, lambda c: c, "_every_n_train_steps", internals.save_triggers),
    (ModelCheckpoint, lambda c: c, "_train_time_interval", internals.save_triggers),
    (lambda: bare(WandbLogger), lambda c: c, "_wandb_init", lambda c: internals.drop_init_argument(c, "anonymous")),
    (SimpleProfiler, lambda c: c, "_lightning_module", internals.profiled_module),
    (DDPStrategy, lambda c: c, "_start_method", internals.start_method),
    (strategy, lambda c: c, "_setup_distributed", internals.connect_processes),
    (strategy, lambda c: c, "_device_mesh", lambda c: internals.set_device_mesh(c, None)),
    (strategy, lambda c: c.lightning_module, "_device_mesh", lambda c: internals.set_device_mesh(c, None)),
    (strategy, lambda c: c, "_get_process_group_backend", lambda c: internals.check_backend_hook(type(c))),
    (lambda: nn.Linear(1, 1), lambda c: c, "_compiled_call_impl", internals.compiled_in_place),
    (lambda: nn.Linear(1, 1), lambda c: c, "_compiled_call_impl", internals.undo_compile),
    (lambda: nn.Linear(1, 1), lambda c: c, "_non_persistent_buffers_set", lambda c: internals.is_persistent(c, "x")),
    (lambda: None, lambda _: torch._dynamo.utils, "get_compilation_metrics", lambda _: internals.dynamo()),
    (lambda: None, lambda _: torch._dynamo.utils, "counters", lambda _: internals.dynamo()),
    (lambda: torch.Tensor._make_subclass(DTensor, torch.zeros(1)), lambda c: c, "_local_tensor", internals.local_part),
    (lambda: bare(DeviceMesh), lambda c: c, "_flatten", lambda c: internals.flatten_mesh(c, "all")),
    (lambda: 8, lambda _: torch.UntypedStorage, "_new_shared", internals.shared_storage),
    (lambda: torch.optim.SGD([nn.Parameter(torch.zeros(1))], fused=True), lambda c: c, "_step_supports_amp_scaling",
     internals.disable_fused),
    (lambda: None, lambda _: jsonargparse._common, "parsing_settings", lambda _: internals.parsing_settings()),
    (scheduler, lambda c: c, "_step_count", lambda c: internals.set_scheduler_position(c, 1, 1, [1.0])),
    (scheduler, lambda c: c, "_last_lr", lambda c: internals.set_scheduler_position(c, 1, 1, [1.0])),
]  # fmt: skip


def remove(monkeypatch, owner, name):
    """Delete an attribute of an object and of its classes."""
    if not isinstance(owner, type) and name in getattr(owner, "__dict__", {}):
        monkeypatch.delattr(owner, name)
    for kind in owner.__mro__ if isinstance(owner, type) else type(owner).__mro__:
        if name in vars(kind):
            monkeypatch.delattr(kind, name)


@pytest.mark.parametrize(("make", "reach", "name", "use"), USES)
def test_a_missing_attribute_is_named_with_the_version_that_has_it(make, reach, name, use, monkeypatch):

    made = make()
    remove(monkeypatch, reach(made), name)
    with pytest.raises(MissingInternal) as caught:
        use(made)
    assert f"{name}`, which bigmodel uses to" in str(caught.value)
    assert f"install {caught.value.package} {internals.READ_IN[caught.value.package]}" in str(caught.value)


@pytest.mark.parametrize("entry", internals.CHECKED, ids=lambda entry: entry[1])
def test_an_attribute_used_in_place_is_checked_at_import(entry, monkeypatch):
    has = hasattr
    monkeypatch.setattr("builtins.hasattr", lambda owner, name: name != entry[1] and has(owner, name))
    spec = importlib.util.spec_from_file_location("again", internals.__file__)
    with pytest.raises(RuntimeError, match=rf"\b{entry[1]}`, which bigmodel uses to"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_other_uses_name_what_is_missing(monkeypatch):
    for state in ({}, {"epoch_progress": {"current": {"ready": 1}}}):
        with pytest.raises(MissingInternal):
            internals.progress_of(state, "epoch_progress")
    monkeypatch.setattr(call, "_call_callback_hooks", lambda trainer, hook: getattr(trainer, hook)())
    with pytest.raises(MissingInternal, match="_call_callback_hooks"):
        internals.skip_hook(Callback(), "on_fit_start")


def test_options_of_the_hub_and_fingerprints_are_checked(monkeypatch):
    hub = pytest.importorskip("transformers.utils.hub")
    monkeypatch.setattr(hub, "cached_files", lambda path, filenames, **options: None)
    with pytest.raises(MissingInternal, match="_raise_exceptions_for"):
        internals.cached_file("model", "config.json", required=True)
    datasets = pytest.importorskip("datasets")
    with pytest.raises(MissingInternal, match="_fingerprint"):
        internals.fingerprint(bare(datasets.Dataset))


def defined(tree):
    """The private names that a module defines, or sets on an object that it owns."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            yield from [node.attr] if node.value.id in ("self", "cls") else []


def test_no_other_module_uses_an_undocumented_attribute():
    root = Path(internals.__file__).parent
    trees = {
        path: ast.parse(path.read_text())
        for path in root.glob("**/*.py")
        if path.name != "internals.py" and "template" not in path.parts
    }
    own = {name for tree in trees.values() for name in defined(tree)}
    own |= {"_C", "_dynamo", "_fields", "_replace", "_asdict", "_sizes", "_run_as_step"}
    checked = {name for _, name, _ in internals.CHECKED}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                assert node.attr in own | checked, (path, node.lineno, node.attr)
