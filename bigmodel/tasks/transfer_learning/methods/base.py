"""Interface of a method of transfer learning: which parameters train, from which step on, and which modules are
replaced.

N samples, B rows of a batch, D width of the features, K classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

if TYPE_CHECKING:
    from bigmodel.tasks.transfer_learning.module import TransferLearning

Named = list[tuple[str, nn.Parameter]]


class Method:
    """A way to fit a pretrained net to a new task.

    Attributes:
        optimizes: False if there is nothing to optimize; the run is then one step long, which changes no weights.
        by_layer: True if the optimizer has a parameter group per layer of the backbone.
    """

    optimizes: ClassVar[bool] = True
    by_layer: ClassVar[bool] = False

    def prepare(self, net: Any, problem: str) -> None:
        """Freeze parameters, and add new modules. Called once, when the net has its pretrained weights.

        Also called before weights trained by this method are loaded, so that their names exist.

        Args:
            net: with `backbone`, `pool`, `dropout` and `head`.
            problem: type of the targets: a `class`, `labels` or a `number`.

        Raises:
            ValueError: if the net is unsuitable for this method.
        """
        raise NotImplementedError

    def trained(self, net: nn.Module) -> Named:
        """Return the parameters that train in this run, now or later, each once."""
        return [(name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad]

    def joins(self, task: TransferLearning) -> dict[int, int]:
        """Return the optimizer steps (from 0) at which initially frozen layers of the backbone are unfrozen, by layer
        number.
        """
        return {}

    def merge(self, net: nn.Module) -> None:
        """Merge added modules into the original weights, so that the net has its original architecture again."""

    def before_transfer(self, task: TransferLearning, batch: Any) -> Any:
        """Return the batch to move to the device, from a batch on the CPU of the trainer's current split."""
        return batch

    # Hooks, in the order of their calls.

    def setup(self, task: TransferLearning) -> None:
        """Called at the start of a fit, when its data are set up; there is no net yet.

        Raises:
            ValueError: if task or data are unsuitable for this method.
        """

    def on_fit_start(self, task: TransferLearning) -> None:
        """Called when weights and data are in place, before anything runs."""

    def on_train_start(self, task: TransferLearning) -> None:
        """Called before the first optimizer step, or the first after a resume."""

    def on_train_batch_start(self, task: TransferLearning, batch_idx: int) -> None:
        """Called before each micro-batch."""

    def on_after_backward(self, task: TransferLearning) -> None:
        """Called after each micro-batch's backward pass."""

    def on_fit_end(self, task: TransferLearning) -> None:
        """Called at the end of a fit."""

    # State that a loaded task needs besides settings and weights; plain values.

    def state_dict(self) -> dict[str, Any]:
        """Return the state for the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any], net: Any) -> None:
        """Load the state of a checkpoint; `net` is None if it has not been built yet."""


class Full(Method):
    """Trains all weights."""

    def prepare(self, net: Any, problem: str) -> None:
        """Do nothing."""


class BiasOnly(Method):
    """Trains biases and the head. Source: BitFit, Ben Zaken et al. 2022 (arXiv 2106.10199)."""

    def prepare(self, net: Any, problem: str) -> None:
        freeze(net.backbone)
        biases = [parameter for name, parameter in net.backbone.named_parameters() if is_bias(name)]
        if not biases:
            raise ValueError(
                "--model.method bias_only: this backbone has no biases; choose among full, gradual, lora, linear_probe and"
                " knn_probe"
            )
        for parameter in biases:
            parameter.requires_grad_(True)


def is_bias(name: str) -> bool:
    """True if a parameter of this name is added to the output of a layer."""
    return name.rpartition(".")[2] in ("bias", "in_proj_bias")


def freeze(module: Any) -> None:
    """Freeze all parameters of a module."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)


def eval_frozen_modules(module: Any) -> None:
    """Put frozen submodules in evaluation mode: no dropout, and BatchNorm statistics unchanged.

    Call it after `train()`. A module is frozen if it has parameters and none of them trains; a BatchNorm is frozen if
    any of its own parameters is, because its statistics belong to them.
    """
    if all(parameter.requires_grad for parameter in module.parameters()):
        return
    for part in module.modules():
        parameters = list(part.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            part.eval()
        elif isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.train(part.training and bool(parameters) and all(p.requires_grad for p in parameters))
