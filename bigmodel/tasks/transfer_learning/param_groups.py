"""Parameter groups of a pretrained net: layer, learning rate and weight decay of each parameter.

Source of the rates: Howard and Ruder 2018 (discriminative fine-tuning, arXiv 1801.06146, section 3.2), geometric as in
Clark et al. 2020 (ELECTRA, arXiv 2003.10555)::

    rate of layer i = rate of the head * decay^(L + 1 - i)

L layers of the backbone; layer 0 is its embeddings or its stem, L + 1 the modules after its blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

_BACKBONE = "backbone."


@dataclass
class LayerGroup:
    """Parameters of one layer or part of the net.

    Attributes:
        name: of the part.
        number: of the layer; None: not a single layer.
        rate: its share of the head's learning rate.
        matrices: parameters that train with weight decay.
        vectors: parameters that train without weight decay: biases, norms.
        frozen: number of frozen parameters (scalars).
    """

    name: str
    number: int | None
    rate: float
    matrices: list[nn.Parameter] = field(default_factory=list)
    vectors: list[nn.Parameter] = field(default_factory=list)
    frozen: int = 0

    @property
    def num_trained(self) -> int:
        """Number of trained parameters (scalars)."""
        return sum(parameter.numel() for parameter in (*self.matrices, *self.vectors))


def layer_groups(net: Any, trainable: Iterable[nn.Parameter], layer_decay: float, by_layer: bool) -> list[LayerGroup]:
    """Return groups of the head, then of the backbone's layers from the top to the input.

    Args:
        net: with `backbone`, which has `num_layers` and `layer_of(name)`; parameters outside of it belong to the head.
        trainable: the parameters that train now or later.
        layer_decay: factor from layer to layer, in 0 < layer_decay <= 1.
        by_layer: make a group per layer even if their rates are the same.
    """
    count = net.backbone.num_layers
    names = {0: "embeddings" if net.backbone.modality == "text" else "stem", count + 1: "after the layers"}
    by_number: dict[int | None, LayerGroup] = {None: LayerGroup("head", None, 1.0)}
    if by_layer or layer_decay < 1:
        for i in range(count + 1, -1, -1):
            by_number[i] = LayerGroup(names.get(i, f"layer {i}"), i, layer_decay ** (count + 1 - i))
    else:
        everywhere = LayerGroup("backbone", None, 1.0)
        by_number |= dict.fromkeys(range(count + 2), everywhere)
    training = {id(parameter) for parameter in trainable}
    for name, parameter in net.named_parameters():
        inside = name.startswith(_BACKBONE)
        layer = by_number[net.backbone.layer_of(name.removeprefix(_BACKBONE)) if inside else None]
        if id(parameter) not in training:
            layer.frozen += parameter.numel()
        elif parameter.ndim >= 2:
            layer.matrices.append(parameter)
        else:
            layer.vectors.append(parameter)
    distinct = {id(layer): layer for layer in by_number.values()}
    return [layer for layer in distinct.values() if layer.num_trained or layer.frozen]


def parameter_groups(of: Iterable[LayerGroup]) -> list[dict[str, Any]]:
    """Return parameter groups for `bigmodel.training.optimizers.configure`.

    For each layer that trains: its matrices, and its vectors without weight decay.
    """
    found = [group for layer in of for group in (
        {"params": layer.matrices, "rate": layer.rate},
        {"params": layer.vectors, "rate": layer.rate, "weight_decay": 0.0},
    )]  # fmt: skip
    return [group for group in found if group["params"]]


def print_table(of: Sequence[LayerGroup], settings: Mapping[str, Any], unfreeze_schedule: Mapping[int, int]) -> None:
    """Print a table of the trained parameters and their settings.

    Args:
        of: the layers.
        settings: the optimizer's defaults: `lr`, and `weight_decay` if it has one.
        unfreeze_schedule: optimizer steps at which initially frozen layers are unfrozen, by layer number.
    """
    table = Table("group", box=None, pad_edge=False)
    for column in ("parameters", "trained", "rate", "decay"):
        table.add_column(column, justify="right")
    decay = settings.get("weight_decay", 0.0)
    for layer in of:
        rate = f"{settings['lr'] * layer.rate:.3g}" if layer.num_trained else "frozen"
        if layer.num_trained and layer.number is not None and layer.number in unfreeze_schedule:
            rate += f" from step {unfreeze_schedule[layer.number] + 1:,}"
        parts = [f"{decay:g}"] if layer.matrices else []
        parts += ["0 (vectors)"] if layer.vectors and decay else []
        total = layer.num_trained + layer.frozen
        table.add_row(layer.name, f"{total:,}", f"{layer.num_trained:,}", rate, ", ".join(parts) or "-")
    whole, trained = sum(layer.num_trained + layer.frozen for layer in of), sum(layer.num_trained for layer in of)
    table.add_row("all", f"{whole:,}", f"{trained:,} ({100 * trained / whole:.3g} %)", "", "")
    Console(soft_wrap=True, highlight=False).print(table)
