"""Nets larger than one device: built without memory for weights, which are made once the net is sharded.

Each process makes its own part of them, and they come out bit for bit as if the net had been built whole on the CPU. How
that is done: `bigmodel.parallel.recording`.
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
    """What the initialisation of a net did to its parameters, and how to do it now. Comes from `deferred`."""

    def __init__(self) -> None:
        self._parts: weakref.WeakKeyDictionary[nn.Module, dict[str, Part]] = weakref.WeakKeyDictionary()

    def materialize(self, module: nn.Module, device: torch.device | str) -> None:
        """Give the parameters of `module` memory and their initial values, and move everything else to the device.

        Parameters may be sharded by now (`fully_shard`, `parallelize_module`): each process gets its part of them. One
        whole parameter at a time is made on the CPU. A dtype that was changed since is respected. Tied ones stay tied.

        Args:
            module: the net, or what contains it.
            device: where parameters shall be; for sharded ones of the type of their mesh's.

        Raises:
            ValueError: a parameter without memory was not built under `deferred`, or has another shape than then.
        """
        names = {id(owner): f"{name}." if name else "" for name, owner in module.named_modules()}
        for name, buffer in module.named_buffers():
            if buffer.is_meta:
                raise ValueError(
                    f"buffer {name} was built on the meta device, so nobody knows what it holds: build the net without"
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
        # FSDP2 takes notice of its parameters' new memory in its own `_apply`.
        module._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))
        filled: set[int] = set()
        for owner, key, part in places:
            parameter = owner._parameters[key]
            assert parameter is not None
            if id(parameter) not in filled:
                _fill(parameter, part.read())
                filled.add(id(parameter))
            del self._parts[owner][key]  # with the tensors it was made from


@contextlib.contextmanager
def deferred(draw: bool = True) -> Iterator[Initialization]:
    """Nets that are built under it get parameters on the meta device, and remember how they were to be initialised.

    Any torch modules: nothing is asked of their code. Buffers and other tensors are real. A parameter with values when a
    module takes it (`nn.Parameter(torch.randn(3))`), and values that are copied into one (`load_state_dict`), are kept as
    they are until `materialize`. Until the end of the block parameters look like real ones on the CPU, and can be read.

    Args:
        draw: False where a checkpoint will replace the weights: nothing is drawn, the parameters will be zero instead.

    Raises:
        ValueError: for what cannot be recorded, such as `parameter.numpy()` or changing a list of parameters in one call.
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
        """These look at their own draws: they are repeated as a whole, or each would keep its result in memory."""

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
    recorder.write_the_rest()


def _to_meta(owners: Iterable[nn.Module], recorder: Recorder, log: Initialization) -> None:
    """Put parameters without memory into the place of all that the modules have."""
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
    """A parameter with these data, and everything else that this one has: class, attributes, requires_grad."""
    new = torch.Tensor._make_subclass(type(parameter), data.detach(), parameter.requires_grad)
    new.__dict__.update(parameter.__dict__)
    return new


@torch.no_grad()
def _fill(parameter: Tensor, whole: Tensor) -> None:
    """Copy what this process holds of the whole into a parameter; rounds where the dtype was changed."""
    if isinstance(parameter, DTensor):
        part = local_part(parameter)
        if part is None:  # this process is not in its mesh
            return
        whole = whole[tuple(slice(start, start + length) for start, length in zip(*part, strict=True))]
        parameter = parameter.to_local()
    parameter.copy_(whole)
