"""The layers of any net, in order from input to output, and its modules that the features do not depend on.

L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from bigmodel.parallel import find_blocks


class LayerAssignment:
    """Assigns parameters of a net to layers: 0 before the layers, 1 to L in them, L + 1 after them.

    Layers are the blocks of `bigmodel.parallel.find_blocks` that are in lists, or the stages around them; without any,
    the elements of the longest list; without lists, the blocks themselves. Modules outside of them are before or after
    them by the order of execution; a module that was not called itself belongs to its parent.

    Args:
        module: the module whose parameters are assigned.
        net: the net in it.
    """

    def __init__(self, module: nn.Module, net: nn.Module) -> None:
        self._modules_by_name = dict(module.named_modules())
        inner = next(name for name, module in self._modules_by_name.items() if module is net)
        self._layers = [f"{inner}.{name}" if inner else name for name in _find_layers(net)]
        self._of = {name: i for i, name in enumerate(self._layers, 1)}
        self.count = len(self._layers)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Record which modules run before the layers, and which after them."""
        begun = 0

        def note(name: str) -> None:
            nonlocal begun
            begun = max(begun, self._of.get(name, 0))
            # Between two layers it belongs to the first of them. The first call counts.
            self._of.setdefault(name, 0 if begun == 0 else begun if begun < self.count else self.count + 1)

        inside = tuple(f"{name}." for name in self._layers)
        hooks = [
            module.register_forward_pre_hook(lambda *_, name=name: note(name))
            for name, module in self._modules_by_name.items()
            if not name.startswith(inside)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._modules_by_name = {}

    def of(self, name: str) -> int:
        """Return the layer of a parameter by its name: that of the innermost known module around it."""
        while name not in self._of and name:
            name = name.rpartition(".")[0]
        return self._of.get(name, 0)


def _find_layers(net: nn.Module) -> list[str]:
    """Return the names of a net's layers, in order."""
    blocks = [name for name, _ in find_blocks(net)]
    listed = list(dict.fromkeys(_stage(name) for name in blocks if _in_list(net, _stage(name))))
    if listed:
        return listed
    lists = [(name, module) for name, module in net.named_modules() if isinstance(module, nn.ModuleList)]
    if lists:
        name, longest = max(lists, key=lambda pair: len(pair[1]))
        return [f"{name}.{inner}" for inner, _ in longest.named_children()]
    return blocks


def _stage(name: str) -> str:
    """Return the stage that a module is in, or its own name: layers of convolutional nets are stages, whatever is
    split.
    """
    parts = name.split(".")
    if "stages" in parts[:-1]:
        return ".".join(parts[: parts.index("stages") + 2])
    return name


def _in_list(net: nn.Module, name: str) -> bool:
    return bool(name) and isinstance(net.get_submodule(name.rpartition(".")[0]), nn.ModuleList | nn.Sequential)


def remove_unused_modules(whole: nn.Module, features: Tensor) -> list[str]:
    """Replace modules that features do not depend on by identities; return their names.

    Args:
        whole: a net whose parameters all train.
        features: computed by it with gradients.
    """
    read = _parameters_behind(features)
    dropped: list[str] = []
    for name, module in list(whole.named_modules()):
        parameters = list(module.parameters())
        inside = bool(dropped) and name.startswith(f"{dropped[-1]}.")
        # Elements of a list may be accessed by name, so it stays.
        if not name or inside or isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        if parameters and not any(id(parameter) in read for parameter in parameters):
            whole.set_submodule(name, nn.Identity())
            dropped.append(name)
    return dropped


def _parameters_behind(features: Tensor) -> set[int]:
    """Return the ids of the leaves that a tensor was computed from.

    Walks the autograd graph without computing gradients, which would need as much memory as the net.
    """
    found: set[int] = set()
    nodes, seen = [features.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.add(id(leaf))
        nodes.extend(before for before, _ in node.next_functions)
    return found
