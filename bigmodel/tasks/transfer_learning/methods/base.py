"""Interface of a fine-tuning method: which parameters train, which modules are added to a net, and how they are merged.

A method has no access to the trainer. The steps of a fit that it needs, such as unfreezing, are callbacks.

To add a method, derive from `Method` and name the class: `--model.method my_package.MyMethod`. For a short name, add it to
`METHODS` in this package's `__init__` and to `MethodName` in the task's module.

N samples, B rows of a batch, D width of the features, K classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch import Callback
from torch import nn

if TYPE_CHECKING:
    from bigmodel.tasks.transfer_learning.module import TransferLearning

Named = list[tuple[str, nn.Parameter]]


class Method:
    """A fine-tuning method.

    Attributes:
        requires_training: False if the net predicts without training, regression targets in their own unit.
        by_layer: True if the optimizer has a parameter group per layer of the backbone.
    """

    requires_training: ClassVar[bool] = True
    by_layer: ClassVar[bool] = False

    def wrap(self, net: Any, problem_type: str) -> None:
        """Freeze parameters, and add new modules. Called once, when the net has its pretrained weights.

        Also called before weights trained by this method are loaded, so that their names exist.

        Args:
            net: with `backbone`, `pool`, `dropout` and `head`.
            problem_type: see `bigmodel.tasks.transfer_learning.problem_type`.

        Raises:
            ValueError: if the net is unsuitable for this method.
        """
        raise NotImplementedError

    def trainable(self, net: nn.Module) -> Named:
        """Return the parameters that train in this run, now or later, each once."""
        return [(name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad]

    def unfreeze_schedule(self, net: Any, num_steps: int) -> dict[int, int]:
        """Return the optimizer steps (from 0) at which initially frozen layers are unfrozen, by layer number.

        Args:
            net: the wrapped net.
            num_steps: optimizer steps of the run; -1: unlimited.
        """
        return {}

    def merge(self, net: nn.Module) -> None:
        """Merge added modules into the original weights, so that the net has its original architecture again."""

    def callbacks(self, task: TransferLearning) -> list[Callback]:
        """Return the callbacks that run this method's part of a fit.

        Args:
            task: the task that is trained; the module of the trainer may be one that contains it.
        """
        return []

    # State that a loaded task needs besides settings and weights; plain values.

    def state_dict(self) -> dict[str, Any]:
        """Return the state for the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any], net: Any) -> None:
        """Load the state of a checkpoint; `net` is None if it has not been built yet."""


class FullFineTuning(Method):
    """Trains all weights."""

    def wrap(self, net: Any, problem_type: str) -> None:
        """Do nothing."""


class BiasOnly(Method):
    """Trains biases and the head. Source: BitFit, Ben Zaken et al. 2022 (arXiv 2106.10199)."""

    def wrap(self, net: Any, problem_type: str) -> None:
        freeze(net.backbone)
        names = ("bias", "in_proj_bias")
        biases = [p for name, p in net.backbone.named_parameters() if name.rpartition(".")[2] in names]
        if not biases:
            raise ValueError(
                "--model.method bias_only: this backbone has no biases; accepted are full, gradual, lora, linear_probe and"
                " knn_probe"
            )
        for parameter in biases:
            parameter.requires_grad_(True)


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
