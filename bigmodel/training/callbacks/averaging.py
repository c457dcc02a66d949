"""Base class of weight averages: evaluated and saved in addition to the live weights, without effect on training steps.

Lightning's `EMAWeightAveraging` and torch's `AveragedModel` copy the whole module before it is sharded, and fail on nets
that are (tests/parallel/test_sharded.py).
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from bigmodel.parallel.tensors import local


class WeightAverage(Callback):
    """Holds `average`, which a subclass updates in `on_train_batch_end`, and evaluates it in place of the live weights.

    `state_dict` in a checkpoint holds the live weights, so that training resumes exactly; `bigmodel.load` uses the
    average if there is one.

    Attributes:
        average: each parameter and saved buffer by name, once (tied weights have one average); empty before the first
            update.
    """

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        kinds = [type(callback).__name__ for callback in callbacks if isinstance(callback, WeightAverage)]
        if len(kinds) > 1:
            raise ValueError(
                f"{' and '.join(kinds)} each evaluate an average in place of the weights, and only one of them can: set"
                " --callbacks.ema null or --callbacks.swa null"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        live = tensors(pl_module)
        self.average = {name: tensor.to(live[name].device) for name, tensor in self.average.items()}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    @torch.no_grad()
    def _swap(self, pl_module: LightningModule) -> None:
        """Exchange the live weights and the average in place; a second call restores them."""
        if not self.average:
            return
        for name, tensor in tensors(pl_module).items():
            live, average = local(tensor), local(self.average[name])
            saved = live.clone()
            live.copy_(average)
            average.copy_(saved)

    @torch.no_grad()
    def _move(self, pl_module: LightningModule, weight: float) -> None:
        """Compute average += weight (live - average); buffers that are not floating-point are copied."""
        live = {name: local(tensor) for name, tensor in tensors(pl_module).items()}
        averaged = [name for name, tensor in live.items() if tensor.is_floating_point()]
        averages = [local(self.average[name]) for name in averaged]
        torch._foreach_lerp_(averages, [live[name] for name in averaged], weight)
        for name in live.keys() - set(averaged):
            local(self.average[name]).copy_(live[name])

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average = state_dict["average"]


def tensors(module: LightningModule) -> dict[str, Tensor]:
    """Return the tensors that a checkpoint would hold, each once, by name."""
    saved = module.state_dict().keys()
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach() for name, tensor in named if name in saved}
