"""What a method of transfer is: which parameters train, from when on, and what stands in their place.

N samples, B rows of a batch, D width of the features, K classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

if TYPE_CHECKING:
    from bigmodel.tasks.transfer_learning.module import TransferLearning

Named = list[tuple[str, nn.Parameter]]


class Method:
    """How a pretrained net is fitted to a new task.

    Attributes:
        optimizes: whether there is anything to optimize; if not, the run is one step long, in which nothing moves.
        by_layer: whether the layers of the backbone are told apart in the optimizer.
    """

    optimizes: ClassVar[bool] = True
    by_layer: ClassVar[bool] = False

    def prepare(self, net: Any, problem: str) -> None:
        """Freeze what does not train, put in what is new. Called once, when the net has its pretrained weights; also where
        weights that were trained by this method are loaded next, which must find the same names.

        Args:
            net: with `backbone`, `pool`, `dropout` and `head`.
            problem: what is told of a sample: a `class`, `labels` or a `number`.

        Raises:
            ValueError: if the net is not one for this method.
        """
        raise NotImplementedError

    def trained(self, net: nn.Module) -> Named:
        """The parameters that train in this run, now or later, each once."""
        return [(name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad]

    def joins(self, task: TransferLearning) -> dict[int, int]:
        """Optimizer steps (from 0) before which layers of the backbone join that are frozen at first, by their number."""
        return {}

    def merge(self, net: nn.Module) -> None:
        """Write what was put in into the weights that were there, so that the net is again one of its own kind."""

    def before_transfer(self, task: TransferLearning, batch: Any) -> Any:
        """A batch on the CPU of the split that the trainer is at, on its way to the device: as it is to be taken there."""
        return batch

    # When something happens, in the order in which it does.

    def setup(self, task: TransferLearning) -> None:
        """A fit is about to begin, its data are set up; there is no net yet.

        Raises:
            ValueError: if task or data are not for this method.
        """

    def on_fit_start(self, task: TransferLearning) -> None:
        """Weights and data are in place; nothing has run yet."""

    def on_train_start(self, task: TransferLearning) -> None:
        """Before the first optimizer step, or the first after a resume."""

    def on_train_batch_start(self, task: TransferLearning, batch_idx: int) -> None:
        """Before each micro-batch."""

    def on_after_backward(self, task: TransferLearning) -> None:
        """After each micro-batch's backward pass."""

    def on_fit_end(self, task: TransferLearning) -> None:
        """Nothing runs any more."""

    # What a loaded task must know besides its settings and weights; plain values.

    def state_dict(self) -> dict[str, Any]:
        """As it stands in the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any], net: Any) -> None:
        """As it stood in the checkpoint; with the net, or None, if it has not been made yet."""


class Full(Method):
    """Every weight trains."""

    def prepare(self, net: Any, problem: str) -> None:
        """Nothing to do."""


class BiasOnly(Method):
    """Biases and the head train. Source: BitFit, Ben Zaken et al. 2022 (arXiv 2106.10199)."""

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
    """Whether a parameter of this name is added to what a layer computes."""
    return name.rpartition(".")[2] in ("bias", "in_proj_bias")


def freeze(module: Any) -> None:
    """Take the gradients away from all parameters of a module."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)


def eval_frozen_modules(module: Any) -> None:
    """Put frozen submodules in evaluation mode: no dropout, and BatchNorm statistics unchanged.

    To be called after `train()`. A module is frozen if it has parameters and none of them trains; a BatchNorm already if one
    of its own does not, for its statistics belong to them.
    """
    if all(parameter.requires_grad for parameter in module.parameters()):
        return
    for part in module.modules():
        parameters = list(part.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            part.eval()
        elif isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.train(part.training and bool(parameters) and all(p.requires_grad for p in parameters))
