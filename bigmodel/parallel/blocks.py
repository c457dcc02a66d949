"""A net's repeated units, and activation checkpointing of them.

Source: Chen et al. 2016 (arXiv 1604.06174): what a block computed is forgotten and made again in the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from types import MethodType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils.checkpoint import checkpoint

Block = tuple[str, nn.Module]


def find_blocks(net: nn.Module) -> list[Block]:
    """The repeated units of a net, by name, in order; none is inside another.

    The first of these that finds any:
        1. the elements of each list or sequence called `blocks`;
        2. modules of the classes that a Hugging Face model names in `_no_split_modules`;
        3. the elements of each list or sequence called `stages`;
        4. the children that have parameters.

    Of a LightningModule, the units of each child that has parameters: of the task's net, or of a student and its teacher.
    """
    if isinstance(net, LightningModule):
        children = [(name, child) for name, child in net.named_children() if any(True for _ in child.parameters())]
        return [(f"{name}.{inner}", block) for name, child in children for inner, block in find_blocks(child)]
    classes = {name for module in net.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    for found in (
        _elements(net, "blocks"),
        _outermost(net, lambda name, module: type(module).__name__ in classes),
        _elements(net, "stages"),
    ):
        if found:
            return found
    return [(name, child) for name, child in net.named_children() if any(True for _ in child.parameters())]


def _elements(net: nn.Module, called: str) -> list[Block]:
    def is_list(name: str, module: nn.Module) -> bool:
        return name.rpartition(".")[2] == called and isinstance(module, nn.ModuleList | nn.Sequential)

    lists = _outermost(net, is_list)
    return [(f"{name}.{inner}", block) for name, elements in lists for inner, block in elements.named_children()]


def _outermost(net: nn.Module, is_one: Callable[[str, nn.Module], bool]) -> list[Block]:
    """The modules for which it is true, none of them inside another."""
    found: list[Block] = []
    for name, module in net.named_modules():
        inside = bool(found) and name.startswith(f"{found[-1][0]}.")  # modules come in depth-first order
        if name and not inside and is_one(name, module):
            found.append((name, module))
    return found


def blocks_of(pl_module: LightningModule, flag: str, only: list[str] | None = None) -> list[Block]:
    """The blocks whose names match one of the patterns, as in a shell; all of them without patterns.

    Raises:
        ValueError: there are none, or a pattern matches none; `flag` is the setting that the message names.
    """
    blocks = find_blocks(pl_module)
    if not blocks:
        raise ValueError(
            f"{type(pl_module).__name__} has no blocks: no list called `blocks` or `stages`, no Hugging Face model, no"
            f" children with parameters; name such a list in the net, or set {flag} null"
        )
    for pattern in only or ():
        if not any(fnmatchcase(name, pattern) for name, _ in blocks):
            raise ValueError(
                f"{flag}.only: {pattern!r} matches no block; they are {', '.join(name for name, _ in blocks)}"
            )
    return [block for block in blocks if only is None or any(fnmatchcase(block[0], pattern) for pattern in only)]


def after_configure_model(pl_module: LightningModule, act: Callable[[LightningModule], None]) -> None:
    """Act on a task when its net is made, before it is moved or sharded; at once where the net was made with the task.

    To be called in a callback's `setup`; its `teardown` shall pop `configure_model` from the task's `__dict__`.
    """
    if not is_overridden("configure_model", pl_module):
        act(pl_module)
        return
    configure = pl_module.configure_model

    @functools.wraps(configure)
    def configured() -> None:
        configure()
        act(pl_module)

    pl_module.configure_model = configured  # type: ignore[method-assign]


class ActivationCheckpointing(Callback):
    """Forgets what blocks compute in training, and computes it again in the backward pass.

    In memory stay the inputs of these blocks, and what one of them computes; a step takes about a third longer. Losses and
    gradients are bitwise the same: dropout is drawn again alike, and batch normalisation counts a batch once. Which
    modules are blocks: `bigmodel.parallel.find_blocks`. Names in the state dict stay as they are.

    Args:
        every: of the blocks, every n-th, from the first: 2 saves half of it at half of the cost.
        only: patterns of names of blocks to choose from, `["net.blocks.*"]`; null: all.

    Raises:
        ValueError: `every` below 1, a net without blocks, a pattern that matches none, or a block that changes its own
            buffers, which cannot be computed twice.
    """

    def __init__(self, every: int = 1, only: list[str] | None = None) -> None:
        if every < 1:
            raise ValueError(
                f"--callbacks.activation_checkpointing.every {every} must be at least 1; to have none,"
                " --callbacks.activation_checkpointing null"
            )
        self.every, self.only = every, only

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            after_configure_model(pl_module, self._install)

    def _install(self, pl_module: LightningModule) -> None:
        blocks = blocks_of(pl_module, "--callbacks.activation_checkpointing", self.only)
        for _, block in blocks[:: self.every]:
            if not _installed(block):
                plain = block.__dict__.get("forward")
                # A method, not a function that knows this block: a copy of the block is to call its own forward.
                block.forward = MethodType(_forward_with_buffers if list(block.buffers()) else _forward, block)
                block.__dict__["_plain_forward"] = plain

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.__dict__.pop("configure_model", None)
        for module in pl_module.modules():
            if _installed(module):
                plain = module.__dict__.pop("_plain_forward")
                del module.forward
                if plain is not None:
                    module.forward = plain


def _installed(module: nn.Module) -> bool:
    return "_plain_forward" in module.__dict__


def _plain(block: nn.Module) -> Callable[..., Any]:
    return block.__dict__["_plain_forward"] or functools.partial(type(block).forward, block)


def _apply(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return forward(*args, **kwargs)


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return _plain(self)(*args, **kwargs)
    # With the keywords among the arguments, their devices' random states are kept too.
    return checkpoint(_apply, _plain(self), args, kwargs, use_reentrant=False)


def _forward_with_buffers(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return _plain(self)(*args, **kwargs)
    if torch.compiler.is_compiling():  # a graph changes buffers once
        return checkpoint(_apply, _plain(self), args, kwargs, use_reentrant=False)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return _buffers_stay(self), _statistics_put_aside(self)

    return checkpoint(_apply, _plain(self), args, kwargs, use_reentrant=False, context_fn=contexts)


def _norms(block: nn.Module) -> Iterator[nn.Module]:
    """Modules that count batches in their buffers, of which their output in training does not depend."""
    return (module for module in block.modules() if isinstance(module, nn.modules.batchnorm._NormBase))


@contextmanager
def _buffers_stay(block: nn.Module) -> Iterator[None]:
    """The first time: no other buffers may change, for a second forward pass would change them again."""
    known = {id(buffer) for norm in _norms(block) for buffer in norm.buffers()}
    others = [(name, buffer, buffer._version) for name, buffer in block.named_buffers() if id(buffer) not in known]
    yield
    for name, buffer, version in others:
        if buffer._version != version:
            raise ValueError(
                f"{type(block).__name__} changes its buffer {name} in the forward pass, which therefore cannot be repeated:"
                " choose other blocks with --callbacks.activation_checkpointing.only"
            )


@contextmanager
def _statistics_put_aside(block: nn.Module) -> Iterator[None]:
    """The second time: running statistics are updated in copies."""
    kept = [(norm, dict(norm._buffers)) for norm in _norms(block)]
    try:
        for norm, buffers in kept:
            norm._buffers.update({name: buffer.clone() for name, buffer in buffers.items() if buffer is not None})
        yield
    finally:
        for norm, buffers in kept:
            norm._buffers.update(buffers)
