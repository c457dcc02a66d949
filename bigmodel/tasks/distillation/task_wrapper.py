"""A LightningModule around a task, which Lightning and its callbacks treat like the task itself."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from bigmodel.run import set_sizes

_PREFIX = "student."
_MODULE_METHODS = set(dir(nn.Module)) - {"forward"}  # they reach submodules without being forwarded


class TaskWrapper(LightningModule):
    """Wraps a task, its only submodule; has no parameters or buffers of its own.

    Public methods of the task, including hooks, are forwarded unless the subclass defines them, and other attributes that
    the wrapper lacks are read from the task. So Lightning's `is_overridden`, and `isinstance` with the protocols of
    `bigmodel.protocols` whose members are methods, give the same results as for the task. The names of parameters, buffers
    and entries of the state dict are those of the task, so checkpoints of the wrapper and of the task are the same.

    Args:
        student: the task.
    """

    student: Any

    def __init__(self, student: LightningModule) -> None:
        super().__init__()
        self.student = student
        self.strict_loading = student.strict_loading
        self.register_state_dict_post_hook(_remove_prefix)
        self.register_load_state_dict_pre_hook(_add_prefix)
        for name, method in inspect.getmembers(type(student), inspect.isfunction):
            default = getattr(LightningModule, name, None)
            defined_here = getattr(type(self), name, None) is not default
            if not (name.startswith("_") or name in _MODULE_METHODS or defined_here or method is default):
                setattr(self, name, self._forwarded(getattr(student, name)))

    def _forwarded(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def forwarded(*args: Any, **kwargs: Any) -> Any:
            return self.call_student(method, *args, **kwargs)

        forwarded.__wrapped__ = inspect.unwrap(method)  # Lightning inspects its arguments
        return forwarded

    def call_student(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method of the task, which may use `self.log` and `self.device_mesh`."""
        bind(self, self.student)
        return method(*args, **kwargs)

    def setup(self, stage: str) -> None:
        bind(self, self.student, "_metric_attributes")  # names of logged metrics: None, for they may be new
        if (known := getattr(self, "_sizes", None)) is not None:
            set_sizes(self.student, known)
        self.call_student(self.student.setup, stage)

    @property
    def hparams(self) -> Any:
        """The hyperparameters of the task, which Lightning saves in checkpoints."""
        return self.student.hparams

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "student":  # not set yet
                raise
            return getattr(self.student, name)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield name.replace(_PREFIX, "", 1), parameter

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        for name, buffer in super().named_buffers(*args, **kwargs):
            yield name.replace(_PREFIX, "", 1), buffer


def bind(outer: LightningModule, inner: LightningModule, *names: str) -> None:
    """Copy to a nested module the state that Lightning (2.6.6) sets on the outermost module only.

    Args:
        names: attributes; by default those that `self.log` and `self.device_mesh` need.
    """
    for name in names or ("_current_fx_name", "_device_mesh"):
        setattr(inner, name, getattr(outer, name))


def _remove_prefix(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    for name in [name for name in state_dict if name.startswith(prefix + _PREFIX)]:
        state_dict[prefix + name.removeprefix(prefix + _PREFIX)] = state_dict.pop(name)


def _add_prefix(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    for name in [name for name in state_dict if name.startswith(prefix)]:
        state_dict[prefix + _PREFIX + name.removeprefix(prefix)] = state_dict.pop(name)
