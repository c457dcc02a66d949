"""Deferred initialization of nets larger than one device: weights are allocated after the net is sharded.

Each process creates its own part of them, bitwise as if the whole net had been built on the CPU. The mechanism is in
`bigmodel.parallel.recording`.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bigmodel.checkpoint.parts import local_part
from bigmodel.parallel.recording import ADVICE, Guard, Part, Recorder


class Initialization:
    """Recorded initialization of a net's parameters, to be executed later. Returned by `deferred`."""

    def __init__(self) -> None:
        self._parts: weakref.WeakKeyDictionary[nn.Module, dict[str, Part]] = weakref.WeakKeyDictionary()

    def materialize(self, module: nn.Module, device: torch.device | str) -> None:
        """Allocate and initialize the parameters of `module`, and move everything else to the device.

        Parameters may be sharded by now (`fully_shard`, `parallelize_module`): each process gets its part of them. One
        whole parameter at a time is created on the CPU. A dtype that was changed since is preserved. Tied ones stay
        tied.

        Args:
            module: the net, or a module that contains it.
            device: the device of the parameters; for sharded ones of the same type as their mesh's.

        Raises:
            ValueError: a parameter without memory was not built under `deferred`, or its shape has changed since.
        """
        names = {id(owner): f"{name}." if name else "" for name, owner in module.named_modules()}
        for name, buffer in module.named_buffers():
            if buffer.is_meta:
                raise ValueError(
                    f"buffer {name} was built on the meta device, without values: build the net without"
                    " torch.device('meta')"
                )
        places: list[tuple[nn.Module, str, Part]] = []
        made: dict[int, nn.Parameter] = {}
        for owner in module.modules():
            for key, parameter in owner._parameters.items():
                if parameter is None or not parameter.is_meta:
                    continue
                part = self._parts.get(owner, {}).get(key)
                if part is None or part.view.size != tuple(parameter.shape):
                    what = (
                        "was not built under deferred()" if part is None else f"was {list(part.view.size)} when built"
                    )
                    raise ValueError(f"parameter {names[id(owner)]}{key} {list(parameter.shape)} {what}: {ADVICE}")
                places.append((owner, key, part))
        for owner, key, _ in places:
            parameter = owner._parameters[key]
            assert parameter is not None
            if not isinstance(parameter, DTensor):  # `_apply` would untie tied ones and lose attributes
                if id(parameter) not in made:
                    made[id(parameter)] = _like(parameter, torch.empty_like(parameter, device=device))
                setattr(owner, key, made[id(parameter)])
        # FSDP2 registers its parameters' new memory in its own `_apply`.
        module._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))
        filled: set[int] = set()
        for owner, key, part in places:
            parameter = owner._parameters[key]
            assert parameter is not None
            if id(parameter) not in filled:
                _fill(parameter, part.read())
                filled.add(id(parameter))
            del self._parts[owner][key]  # frees the tensors that it refers to


@contextlib.contextmanager
def deferred(draw: bool = True) -> Iterator[Initialization]:
    """Context in which nets get parameters on the meta device, with their initialization recorded.

    Works for any torch modules, without changes to their code. Buffers and other tensors are real. A parameter that has
    values when it is registered (`nn.Parameter(torch.randn(3))`), and values that are copied into one
    (`load_state_dict`), are stored until `materialize`. Until the end of the block, parameters behave like real ones on
    the CPU, and can be read.

    Args:
        draw: False if a checkpoint will replace the weights: nothing is drawn, the parameters are zero instead.

    Raises:
        ValueError: for operations that cannot be recorded, such as `parameter.numpy()` or changing a list of parameters
            in one call.
    """
    log = Initialization()
    recorder = Recorder(draw)
    owners: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    register, set_state = nn.Module.register_parameter, nn.Module.__setstate__

    @functools.wraps(register)
    def registering(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        owners.add(module)
        if param is not None:
            recorder.adopt(param, f"{type(module).__name__}.{name}")

    @functools.wraps(set_state)
    def copied(module: nn.Module, state: dict[str, Any]) -> None:  # copy.deepcopy registers nothing
        set_state(module, state)
        owners.add(module)

    def recorded(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Record the whole call of an initializer that reads its own draws; else each step would be stored."""

        @functools.wraps(function)
        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if recorder.recipe(tensor) is None:
                return function(tensor, *args, **kwargs)
            return recorder.record(function, (tensor, *args), kwargs, [tensor], random=True)

        return call

    with contextlib.ExitStack() as stack:
        for name in ("_no_grad_trunc_normal_", "orthogonal_"):
            stack.callback(setattr, nn.init, name, getattr(nn.init, name))
            setattr(nn.init, name, recorded(getattr(nn.init, name)))
        stack.callback(setattr, nn.Module, "register_parameter", register)
        nn.Module.register_parameter = registering  # type: ignore[assignment, method-assign]
        stack.callback(setattr, nn.Module, "__setstate__", set_state)
        nn.Module.__setstate__ = copied  # type: ignore[method-assign]
        stack.enter_context(Guard(recorder))
        stack.enter_context(recorder)
        yield log
    _to_meta(owners, recorder, log)
    recorder.write_others()


def _to_meta(owners: Iterable[nn.Module], recorder: Recorder, log: Initialization) -> None:
    """Replace all parameters of the modules by parameters without memory."""
    swapped: dict[int, nn.Parameter] = {}
    for owner in owners:
        for name, parameter in list(owner._parameters.items()):
            if parameter is None or parameter.is_meta:
                continue
            if id(parameter) not in swapped:
                swapped[id(parameter)] = _like(parameter, torch.empty_like(parameter, device="meta"))
            log._parts.setdefault(owner, {})[name] = recorder.part(parameter)
            # `__setattr__` because recurrent nets also hold their parameters in a list.
            setattr(owner, name, swapped[id(parameter)])


def _like(parameter: nn.Parameter, data: Tensor) -> nn.Parameter:
    """Return a parameter with these data, and the class, attributes and requires_grad of this one."""
    new = torch.Tensor._make_subclass(type(parameter), data.detach(), parameter.requires_grad)
    new.__dict__.update(parameter.__dict__)
    return new


@torch.no_grad()
def _fill(parameter: Tensor, whole: Tensor) -> None:
    """Copy this process's part of the whole tensor into a parameter; rounds if the dtype was changed."""
    if isinstance(parameter, DTensor):
        part = local_part(parameter)
        if part is None:  # this process is not in its mesh
            return
        whole = whole[tuple(slice(start, start + length) for start, length in zip(*part, strict=True))]
        parameter = parameter.to_local()
    parameter.copy_(whole)
