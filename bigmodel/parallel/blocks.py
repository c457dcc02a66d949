"""Repeated units of a net (blocks), and activation checkpointing of them.

Source: Chen et al. 2016 (arXiv 1604.06174): a block's activations are discarded and recomputed in the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MethodType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils.checkpoint import checkpoint

Block = tuple[str, nn.Module]


def trained_task(module: LightningModule) -> LightningModule:
    """Return the task that a module trains: the submodule that its attribute `trained_submodule` names, else itself."""
    name = getattr(module, "trained_submodule", None)
    task: LightningModule = module if name is None else getattr(module, name)
    return task


def find_blocks(net: nn.Module) -> list[Block]:
    """Return the repeated units of a net, by name, in order; none is inside another.

    The first of these rules that finds any:
        1. the elements of each list or sequence called `blocks`;
        2. modules of the classes that a Hugging Face model names in `_no_split_modules`;
        3. the elements of each list or sequence called `stages`;
        4. the children that have parameters, except embeddings (`nn.Embedding`): a net may read these from the outside,
           as for scores of all items.

    For a LightningModule, the units of each child of its task (`trained_task`) that has parameters.
    """
    if isinstance(net, LightningModule):
        parts = trained_task(net).named_children()
        children = [(name, child) for name, child in parts if any(True for _ in child.parameters())]
        return [(f"{name}.{inner}", block) for name, child in children for inner, block in find_blocks(child)]
    classes = {name for module in net.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    for found in (
        _elements(net, "blocks"),
        _outermost(net, lambda name, module: type(module).__name__ in classes),
        _elements(net, "stages"),
    ):
        if found:
            return found
    children = [(name, child) for name, child in net.named_children() if not isinstance(child, nn.Embedding)]
    return [(name, child) for name, child in children if any(True for _ in child.parameters())]


def _elements(net: nn.Module, called: str) -> list[Block]:
    def is_list(name: str, module: nn.Module) -> bool:
        return name.rpartition(".")[2] == called and isinstance(module, nn.ModuleList | nn.Sequential)

    lists = _outermost(net, is_list)
    return [(f"{name}.{inner}", block) for name, elements in lists for inner, block in elements.named_children()]


def _outermost(net: nn.Module, is_one: Callable[[str, nn.Module], bool]) -> list[Block]:
    """Return the modules that satisfy a condition, none of them inside another."""
    found: list[Block] = []
    for name, module in net.named_modules():
        inside = bool(found) and name.startswith(f"{found[-1][0]}.")  # modules come in depth-first order
        if name and not inside and is_one(name, module):
            found.append((name, module))
    return found


def blocks_of(pl_module: LightningModule, flag: str, only: list[str] | None = None) -> list[Block]:
    """Return the blocks whose names match one of the shell-style patterns; all of them without patterns.

    Raises:
        ValueError: there are none, or a pattern matches none; `flag` is the setting that the message names.
    """
    blocks = find_blocks(pl_module)
    if not blocks:
        raise ValueError(
            f"{type(pl_module).__name__} has no blocks: no list called `blocks` or `stages`, no Hugging Face model, no"
            f" children with parameters; add such a list to the net, or set {flag} null"
        )
    for pattern in only or ():
        if not any(fnmatchcase(name, pattern) for name, _ in blocks):
            raise ValueError(
                f"{flag}.only: {pattern!r} matches no block; they are {', '.join(name for name, _ in blocks)}"
            )
    return [block for block in blocks if only is None or any(fnmatchcase(block[0], pattern) for pattern in only)]


def after_configure_model(pl_module: LightningModule, act: Callable[[LightningModule], None]) -> None:
    """Run `act` on a task when its net is created, before it is moved or sharded; at once if the net already exists.

    To be called in a callback's `setup`: Lightning has no hook between the net's creation and its sharding.
    """
    if not is_overridden("configure_model", pl_module):
        act(pl_module)
        return
    configure = pl_module.configure_model

    @functools.wraps(configure)
    def configured() -> None:
        pl_module.__dict__.pop("configure_model", None)
        configure()
        act(pl_module)

    pl_module.configure_model = configured  # type: ignore[method-assign]


class ActivationCheckpointing(Callback):
    """Discards activations of blocks in training, and recomputes them in the backward pass.

    The inputs of these blocks, and the activations of one of them, stay in memory; the cost is one more forward pass,
    about a third of a step's work, which `speed/mfu` does not count. Losses and gradients are bitwise the same: dropout
    masks are reproduced, and batch normalisation counts a batch once. The blocks are those of
    `bigmodel.parallel.find_blocks`. Names in the state dict do not change.

    Args:
        every: checkpoint every n-th block, from the first: 2 saves half of the memory at half of the cost.
        only: patterns of names of blocks to choose from, `["net.blocks.*"]`; null: all.

    Raises:
        ValueError: `every` below 1, a net without blocks, a pattern that matches none, or a block that changes its own
            buffers, which cannot be computed twice.
    """

    def __init__(self, every: int = 1, only: list[str] | None = None) -> None:
        if every < 1:
            raise ValueError(
                f"--callbacks.activation_checkpointing.every {every} must be at least 1; to switch it off, set"
                " --callbacks.activation_checkpointing null"
            )
        self.every, self.only = every, only

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            after_configure_model(pl_module, self._install)

    def _install(self, pl_module: LightningModule) -> None:
        blocks = blocks_of(pl_module, "--callbacks.activation_checkpointing", self.only)
        for _, block in blocks[:: self.every]:
            if _KEY not in block.__dict__:
                block.__dict__[_KEY] = _Checkpointed.of(block)
                # A bound method, not a closure over this block: a copy of the block must call its own forward.
                block.forward = MethodType(_forward, block)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for module in pl_module.modules():
            checkpointed = module.__dict__.pop(_KEY, None)
            if checkpointed is not None:
                del module.forward
                if checkpointed.forward is not None:
                    module.forward = checkpointed.forward


_KEY = "_checkpointed"


@dataclass
class _Checkpointed:
    """State of a block while its activations are checkpointed.

    Attributes:
        forward: the instance's own `forward`, if any.
        norms: modules that count batches in their buffers; their output in training does not depend on these.
        stateful: other modules with buffers.
    """

    forward: Callable[..., Any] | None
    norms: list[nn.Module]
    stateful: list[nn.Module]

    @classmethod
    def of(cls, block: nn.Module) -> _Checkpointed:
        holders = [
            module for module in block.modules() if any(buffer is not None for buffer in module._buffers.values())
        ]
        norms: list[nn.Module] = [module for module in holders if isinstance(module, nn.modules.batchnorm._NormBase)]
        return cls(block.__dict__.get("forward"), norms, [module for module in holders if module not in norms])

    @contextmanager
    def first(self) -> Iterator[None]:
        """Context of the forward pass: raise if it changes buffers, since recomputation would change them again."""
        before = [
            (module, name, buffer, buffer._version)
            for module in self.stateful
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        yield
        for module, name, buffer, version in before:
            if buffer._version != version:
                raise ValueError(
                    f"{type(module).__name__} changes its buffer {name} in the forward pass, which therefore cannot be"
                    " repeated: choose other blocks with --callbacks.activation_checkpointing.only"
                )

    @contextmanager
    def second(self) -> Iterator[None]:
        """Context of the recomputation in the backward pass: running statistics are updated in copies."""
        saved = [(norm, dict(norm._buffers)) for norm in self.norms]
        try:
            for norm, buffers in saved:
                norm._buffers.update({name: buffer.clone() for name, buffer in buffers.items() if buffer is not None})
            yield
        finally:
            for norm, buffers in saved:
                norm._buffers.update(buffers)


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Forward of a checkpointed block."""
    checkpointed: _Checkpointed = self.__dict__[_KEY]
    forward = checkpointed.forward or functools.partial(type(self).forward, self)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    options: dict[str, Any] = {"use_reentrant": False}
    # A compiled graph changes buffers once, even if it recomputes activations.
    if (checkpointed.norms or checkpointed.stateful) and not torch.compiler.is_compiling():
        options["context_fn"] = lambda: (checkpointed.first(), checkpointed.second())
    # Keyword arguments are passed positionally, so that the random states of their devices are saved too.
    return checkpoint(_call, forward, args, kwargs, **options)


def _call(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return forward(*args, **kwargs)
