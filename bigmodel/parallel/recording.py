"""Recording of a net's parameter initialisation, to be repeated later.

Operations on parameters (draw, fill, scale, copy) are recorded instead of executed: the memory that `torch.empty`
reserved is never touched. Random initialisers still run, into a scratch buffer, so that the generator advances exactly
as in a normal construction; each parameter can be drawn again separately, from the generator's state before it. Reading
a parameter in the meantime returns the value that it would hold. Recording an initialisation to repeat it is the idea
of torchdistX's deferred_init.

A *recipe* is the sequence of operations that produces the contents of one storage; a *view* is a tensor's location in
its storage, so that an operation on a part of a parameter (`weight[padding_index].fill_(0)`) is recorded like one on
the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ADVICE = "build the net as usual with --trainer.strategy.deferred_init false"
_aten = torch.ops.aten
_EMPTY = {_aten.empty, _aten.empty_strided, _aten.empty_like, _aten.new_empty, _aten.new_empty_strided}
_COPIES = {_aten.clone, _aten._to_copy}
_OVERWRITES = {_aten.normal_, _aten.uniform_, _aten.fill_, _aten.zero_, _aten.copy_}  # earlier contents are irrelevant
_PAST_RECORDING = {"numpy", "__array__", "tolist", "__dlpack__"}  # Tensor's methods that torch does not dispatch


@dataclass(frozen=True)
class View:
    """Location of a tensor in its storage, in elements."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> View:
        return cls(tuple(tensor.size()), tensor.stride(), int(tensor.storage_offset()))

    def read(self, contents: Tensor) -> Tensor:
        """Return this view of the contents [length] of a storage."""
        return contents.as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True)
class Snapshot:
    """Tensor whose values an initialisation used."""

    tensor: Tensor
    version: int  # detects later overwriting; -1: a private copy

    @classmethod
    def of(cls, tensor: Tensor) -> Snapshot:
        return cls(tensor.clone(), -1) if tensor.is_inference() else cls(tensor, tensor._version)

    def read(self, contents: Tensor) -> Tensor:
        if self.version >= 0 and self.tensor._version != self.version:
            raise ValueError(
                f"a tensor {list(self.tensor.shape)} that parameters were initialised from was overwritten before they were"
                f" made: give each its own, or {ADVICE}"
            )
        return self.tensor


@dataclass
class Recipe:
    """Operations that produce the contents of a storage: `calls`, in order, on memory for `length` elements."""

    length: int
    dtype: torch.dtype
    calls: tuple[Call, ...] = ()

    def make(self) -> Tensor:
        """Return the contents [length], on the CPU."""
        contents = torch.empty(self.length, dtype=self.dtype, device="cpu")
        for call in self.calls:
            call.run(contents)
        return contents


@dataclass(frozen=True)
class Part:
    """View of a recipe's contents: a parameter when the net is built, or an argument that is read from another one."""

    recipe: Recipe
    view: View

    def read(self, contents: Tensor | None = None) -> Tensor:
        return self.view.read(self.recipe.make())


@dataclass(frozen=True)
class Call:
    """In-place operation. `View` arguments refer to the current contents, `Part` arguments to another recipe's."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: Tensor | None = None  # of the generator, before a random operation

    def run(self, contents: Tensor, generator: torch.Generator | None = None) -> None:
        """Apply it to the contents; draw from `generator`, by default from a new one in the recorded state."""
        references = (View, Part, Snapshot)
        args, kwargs = tree_map_only(references, lambda argument: argument.read(contents), (self.args, self.kwargs))
        if self.state is not None:
            kwargs["generator"] = generator or torch.Generator().set_state(self.state)
        with torch.no_grad():
            self.function(*args, **kwargs)


class Recorder(TorchDispatchMode):
    """Records in-place operations on parameters whose storages have not been written to yet."""

    def __init__(self, draw: bool) -> None:
        super().__init__()
        self.draw = draw
        # By storage. A weak reference prevents reuse of the address.
        self._unwritten: dict[int, StorageWeakRef] = {}
        self._recipes: dict[int, tuple[StorageWeakRef, Recipe, str]] = {}
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._latest: tuple[Recipe, tuple[Call, ...], Tensor] | None = None  # the most recently computed contents

    def adopt(self, parameter: Tensor, name: str) -> None:
        """Record a parameter from now on, if it comes from `torch.empty`."""
        if is_lazy(parameter):
            raise ValueError(
                f"{name} takes its shape from the first batch, but must have one: give the module its sizes, or {ADVICE}"
            )
        key = _key(parameter)
        if key in self._unwritten:
            length = parameter.untyped_storage().nbytes() // parameter.element_size()
            self._recipes[key] = (self._unwritten.pop(key), Recipe(length, parameter.dtype), name)

    def recipe(self, tensor: Tensor) -> Recipe | None:
        found = self._recipes.get(_key(tensor))
        return None if found is None else found[1]

    def part(self, tensor: Tensor) -> Part:
        """Return the tensor's current contents, without later operations."""
        recipe = self.recipe(tensor)
        if recipe is not None:
            return Part(Recipe(recipe.length, recipe.dtype, recipe.calls), View.of(tensor))
        dense = torch.empty_like(tensor, device="meta")  # for a slice, without the elements between its rows
        view = View(tuple(tensor.size()), dense.stride(), 0)
        return Part(Recipe(tensor.numel(), tensor.dtype, (Call(_aten.copy_, (view, Snapshot.of(tensor)), {}),)), view)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operation, name = func._overloadpacket, func._schema.name.removeprefix("aten::")
        written = _written(func, args, kwargs)
        if torch.Tag.inplace_view in func.tags and operation is not _aten.resize_:  # `t_`, `set_`: touches no contents
            return func(*args, **kwargs)
        if any(self.recipe(tensor) is not None for tensor in written):
            random = torch.Tag.nondeterministic_seeded in func.tags
            return self.record(func, args, kwargs, written, random=random)
        for tensor in written:
            self._unwritten.pop(_key(tensor), None)
        if operation in _COPIES and self.recipe(args[0]) is not None:
            return self._copy(func, args, kwargs)
        if not func.is_view and not name.startswith("new_") and not name.endswith("_like"):
            args, kwargs = tree_map_only(Tensor, self._read, (args, kwargs))
        result = func(*args, **kwargs)
        if operation in _EMPTY and result.device.type == "cpu":
            self._unwritten[_key(result)] = StorageWeakRef(result.untyped_storage())
        return result

    def record(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: list[Tensor], *, random: bool
    ) -> Any:
        """Record a call; a random one is also executed."""
        target = written[0]
        key = _key(target)
        recipe = self._recipes[key][1] if key in self._recipes else None
        operation = getattr(function, "_overloadpacket", function)
        if recipe is None or len(written) > 1 or operation is _aten.resize_ or target.dtype != recipe.dtype:
            label = next(self._recipes[_key(t)][2] for t in written if _key(t) in self._recipes)
            raise ValueError(f"{operation} on {label} cannot be deferred until the net is sharded: {ADVICE}")
        if random and not self.draw:
            operation, function, args, kwargs, random = _aten.zero_, _aten.zero_, (target,), {}, False

        def reference(tensor: Tensor) -> View | Part | Snapshot:
            if _key(tensor) == key:
                return View.of(tensor)
            return Snapshot.of(tensor) if self.recipe(tensor) is None else self.part(tensor)

        generator = kwargs.get("generator") or torch.default_generator
        state = generator.get_state() if random else None
        own = sum(isinstance(leaf, Tensor) and _key(leaf) == key for leaf in tree_leaves((args, kwargs)))
        saved_args, saved_kwargs = tree_map_only(Tensor, reference, (args, kwargs))
        saved_kwargs.pop("generator", None)
        call = Call(function, saved_args, saved_kwargs, state)
        overwrites = operation in _OVERWRITES and own == 1 and target.numel() == recipe.length
        recipe.calls = (call,) if overwrites else (*recipe.calls, call)
        if random:
            contents = self._scratch_for(recipe)
            call.run(contents, generator)
            self._latest = (recipe, recipe.calls, contents) if overwrites else None
        return target

    def _scratch_for(self, recipe: Recipe) -> Tensor:
        """Return memory [length] to draw into, always the same.

        Newly allocated memory would be reused for the next parameter, which would then no longer be untouched.
        """
        size = recipe.length * recipe.dtype.itemsize
        if len(self._scratch) < size:
            self._scratch = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self._scratch[:size].view(recipe.dtype)

    def _copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return a copy of a recorded tensor: its recipe begins with the source's."""
        source, *rest = args
        found = self._recipes[_key(source)]
        kwargs = {name: value for name, value in kwargs.items() if name != "device"}  # chosen in `materialize`
        shape = func(torch.empty_like(source, device="meta"), *rest, **kwargs)
        result = torch.empty_strided(shape.size(), shape.stride(), dtype=shape.dtype, device="cpu")
        recipe = Recipe(result.numel(), result.dtype)
        recipe.calls = (Call(_aten.copy_, (View.of(result), self.part(source)), {}),)
        self._recipes[_key(result)] = (StorageWeakRef(result.untyped_storage()), recipe, found[2])
        return result

    def _read(self, tensor: Tensor) -> Tensor:
        """Return the tensor with the contents that it would hold by now."""
        recipe = self.recipe(tensor)
        if recipe is None:
            return tensor
        if self._latest is None or self._latest[0] is not recipe or self._latest[1] is not recipe.calls:
            self._latest = recipe, recipe.calls, recipe.make()
        return View.of(tensor).read(self._latest[2])

    def write_others(self) -> None:
        """Write the contents of recorded tensors that are not parameters: buffers, attributes."""
        for reference, recipe, _ in self._recipes.values():
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is not None:
                torch.empty(0, dtype=recipe.dtype).set_(storage).copy_(recipe.make())


class Guard(TorchFunctionMode):
    """Raises if code requests the memory of a parameter that is only recorded."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _PAST_RECORDING and isinstance(args[0], Tensor) and self._recorder.recipe(args[0]) is not None:
            label = self._recorder._recipes[_key(args[0])][2]
            raise ValueError(
                f"{name}() of {label} cannot be recorded while the net is built: use torch operations, or {ADVICE}"
            )
        return func(*args, **(kwargs or {}))


def _key(tensor: Tensor) -> int:
    """Return a key of the tensor's storage; 0 for a tensor without one."""
    return tensor.untyped_storage()._cdata if torch._C._has_storage(tensor) else 0


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that an operation writes to."""
    written: list[Any] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += tree_leaves(kwargs.get(argument.name) if argument.kwarg_only or i >= len(args) else args[i])
    return [tensor for tensor in written if isinstance(tensor, Tensor)]
