"""Base class of tasks: optimizer, schedule, and the callbacks that a loss given as a sum needs."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor

from bigmodel.training import optimizers, schedules
from bigmodel.training.callbacks.gradient_scaling import GradientScaling, get_callback


class BaseTask(LightningModule):
    """Task with a net, an optimizer and a schedule. The built-in tasks derive from it; other tasks need not.

    A subclass defines `training_step`, which returns `{"loss": sum, "count": number}`, and creates `net` in
    `configure_model`.

    Args:
        optimizer: factory of the optimizer, called with parameter groups.
        schedule: learning rate schedule over the run's optimizer steps; None: constant.

    Attributes:
        net: the net; None until `configure_model`. It maps inputs to logits; if it has the methods `features` and
            `logits`, the latter is its output layer.
        count_unit: unit of the count that `training_step` returns.
        callback_types: callbacks that the task needs; a Trainer that lacks one gets it.
    """

    count_unit = "samples"
    callback_types: ClassVar[tuple[type[Callback], ...]] = (GradientScaling,)

    def __init__(
        self,
        optimizer: optimizers.OptimizerFactory = torch.optim.AdamW,
        schedule: schedules.Schedule | None = None,
    ) -> None:
        super().__init__()
        self.optimizer, self.schedule = optimizer, schedule
        self.net: Any = None

    def configure_callbacks(self) -> list[Callback]:
        return [kind() for kind in self.callback_types if get_callback(self.trainer, kind) is None]

    def configure_optimizers(self) -> Any:
        return optimizers.configure(self, self.optimizer, self.schedule)

    def net_features(self, *inputs: Any) -> Tensor:
        """Return the input of the net's output layer [B, ..., D]; the logits if it has no separate output layer."""
        features: Tensor = getattr(self.net, "features", self.net)(*inputs)
        return features

    def logits(self, features: Tensor) -> Tensor:
        """Map features [..., D] to logits [..., K]; may be called on chunks."""
        return self.net.logits(features) if hasattr(self.net, "logits") else features

    def log_metrics(self, split: str, metrics: Any) -> None:
        """Log metrics over all processes as `split/name`, and reset them.

        Args:
            split: val, test, or another prefix.
            metrics: `compute` returns tensors by name; `reset` starts anew.
        """
        for name, value in metrics.compute().items():
            self.log(f"{split}/{name}", value.to(torch.float32), sync_dist=True)
        metrics.reset()
