"""`--trainer.precision auto`: bf16-mixed if this device computes the net faster in it than in float32, else 32-true.

A CPU with bf16 instructions computes large products about twice as fast in bf16; one without emulates it, at a tenth to
a thirtieth of float32's speed. On a CPU, the net's own products are timed (`bigmodel.training.machine`); a GPU is
queried for its capabilities.

`ChoosePrecision` is the callback that the command adds. It needs the net, which is created after the trainer, so the
trainer starts with `Undecided` in place of Lightning's precision plugin.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import nn

from bigmodel.training.machine import Shape, bf16_speed

PRECISIONS = ("auto", "bf16-mixed", "32-true", "16-mixed", "bf16-true", "16-true", "64-true")
_OTHER_PRECISIONS = ("transformer-engine", "transformer-engine-float16", "bf16", "16", "32", "64", 16, 32, 64, None)
_FASTER = 1.2  # times float32's speed: required of bf16 products, since casts and other operations do not get faster
_EMULATED = 0.5  # times float32's speed: below it, bf16 is emulated
_DEFAULT: Shape = (256, 256)  # of a weight, if there is no net yet
_NUM_SHAPES = 4  # timed shapes: those with the most operations


def check_precision(precision: Any) -> None:
    """Raise for a precision that is neither `auto` nor one of Lightning's.

    Raises:
        ValueError: for any other value.
    """
    if precision not in (*PRECISIONS, *_OTHER_PRECISIONS):
        raise ValueError(f"--trainer.precision {precision}: {', '.join(PRECISIONS)} are accepted")


@dataclass(frozen=True)
class Choice:
    """Precision and the reason for it.

    Attributes:
        precision: `bf16-mixed` or `32-true`.
        reason: a clause for a printed line, such as "on this CPU, bf16 has 1.8 times the speed of float32 ...".
        speed: of bf16 over float32, if it was measured.
        emulated: True if the device has no instructions for bf16.
    """

    precision: str
    reason: str
    speed: float | None = None
    emulated: bool = False


def choose(device: torch.device, net: nn.Module | None = None) -> Choice:
    """Return the faster of bf16-mixed and 32-true for training a net on a device.

    Args:
        device: where it is trained.
        net: with its layers, on any device, possibly without memory; None: a layer of 256 x 256 is used instead.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Choice("bf16-mixed", f"{name} has bf16 instructions")
        return Choice("32-true", f"{name} has no bf16 instructions", emulated=True)
    if device.type != "cpu":
        return Choice("32-true", f"bf16 is not measured on a device of type {device.type}")
    shapes = product_shapes(net) if net is not None else Counter([_DEFAULT])
    if not shapes:
        return Choice("32-true", "this net has no matrix products")
    speed = _speed(shapes)
    products = "this net's products" if net is not None else f"products of {_DEFAULT[0]} x {_DEFAULT[1]}"
    if speed < _EMULATED:
        factor = f"{1 / speed:.0f} times as long"
        return Choice("32-true", f"on this CPU, bf16 takes {factor} as float32 for {products}", speed, emulated=True)
    precision = "bf16-mixed" if speed >= _FASTER else "32-true"
    return Choice(precision, f"on this CPU, bf16 has {speed:.1f} times the speed of float32 for {products}", speed)


def product_shapes(net: nn.Module) -> Counter[Shape]:
    """Return the shapes of a net's multiplied weights, [out, in, ...], with the number of operations per row.

    All matrices and the weights of convolutions. Embeddings are included, because a net that ties its head multiplies
    by them as well.
    """
    kernels = {module.weight for module in net.modules() if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)}
    operations: Counter[Shape] = Counter()
    for parameter in net.parameters():
        if parameter.ndim == 2 or parameter in kernels:
            operations[tuple(parameter.shape)] += parameter.numel()
    return operations


def _speed(operations: Counter[Shape]) -> float:
    """Return the speed of bf16 over that of float32: the ratio of the times of the operations."""
    most = operations.most_common(_NUM_SHAPES)
    speeds = []
    for shape, _ in most:
        speeds.append(bf16_speed(shape))
        if speeds[-1] < _EMULATED:
            break
    counts = [count for _, count in most[: len(speeds)]]
    return sum(counts) / sum(count / speed for count, speed in zip(counts, speeds, strict=True))


class Undecided(Precision):
    """Placeholder of a precision that is chosen once the net is created; see `ChoosePrecision`."""

    precision: Any = "auto"

    def decide(self, trainer: Trainer) -> None:
        """Choose the precision now."""
        decide(trainer)

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Choose the precision, before the strategy sets up the net."""
        assert isinstance(module, LightningModule)
        self.decide(module.trainer)
        return module.trainer.precision_plugin.convert_module(module)

    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        raise AssertionError(
            "the precision is used before it was chosen: call bigmodel.training.precision.decide first"
        )
        yield


def decide(trainer: Trainer) -> None:
    """Choose the precision now, if still undecided: by the net if it exists, and equally on all processes.

    To be called by code that needs the precision early: a strategy that shards the net, a cache that depends on it.
    """
    chooser = next((one for one in trainer.callbacks if isinstance(one, ChoosePrecision)), None)  # type: ignore[attr-defined]
    if chooser is not None and isinstance(trainer.precision_plugin, Undecided):
        chooser.decide(trainer)


class ChoosePrecision(Callback):
    """Chooses the trainer's precision if it is `auto`; prints a line if bf16 was set on a CPU that emulates it.

    Attributes:
        choice: the choice and its reason; None before, and if the precision was set.
    """

    def __init__(self) -> None:
        self.choice: Choice | None = None

    def decide(self, trainer: Trainer) -> None:
        """Choose the precision, see `decide`."""
        device, task = trainer.strategy.root_device, trainer.lightning_module
        made = next(task.parameters(), None) is not None
        self.choice = trainer.strategy.broadcast(choose(device, task if made else None))
        bf16 = self.choice.precision == "bf16-mixed"
        trainer.strategy.precision_plugin = MixedPrecision("bf16-mixed", device.type) if bf16 else Precision()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" and trainer.is_global_zero and (line := self.describe(trainer, None)) is not None:
            print(line, flush=True)

    def describe(self, trainer: Trainer, net: nn.Module | None, chosen_before: bool = False) -> str | None:
        """Return a line on the choice, or on this device's speed in the configured precision; None if not needed.

        Args:
            trainer: the trainer with this precision.
            net: the trained net; None if it does not exist yet.
            chosen_before: this run chose the precision, maybe on another machine, before it was resumed.
        """
        precision = trainer.precision
        if self.choice is not None:
            return f"precision  {precision}: {self.choice.reason}"
        if isinstance(trainer.precision_plugin, Undecided) or not (chosen_before or precision.startswith("bf16")):
            return None
        here = choose(trainer.strategy.root_device, net)
        if chosen_before and here.precision != precision:
            return (
                f"precision  {precision}, as when this run began; auto would select {here.precision} here:"
                f" {here.reason} (--trainer.precision auto measures again)"
            )
        if here.emulated and precision.startswith("bf16"):
            return f"precision  {precision}, as set, but {here.reason}; --trainer.precision 32-true is faster"
        return None
