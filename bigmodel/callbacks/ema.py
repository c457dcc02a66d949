"""Exponential moving average of the weights (Polyak and Juditsky 1992), evaluated and saved beside the live ones."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class EMA(Callback):
    """Keeps average = decay * average + (1 - decay) * weights after each optimizer step, and evaluates the average.

    Floating-point buffers (running statistics) are averaged too, others copied. `state_dict` in a checkpoint stays the live
    weights, so that training resumes exactly; `bigmodel.load` takes the average when there is one.

    Args:
        decay: weight of the old average per optimizer step, in [0, 1).
        start_step: optimizer steps before which the average simply follows the weights.
    """

    def __init__(self, decay: float = 0.999, start_step: int = 0) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"--callbacks.ema.decay {decay} must lie in 0 <= decay < 1")
        self.decay = decay
        self.start_step = start_step
        self.average: dict[str, Tensor] = {}
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        live = _tensors(pl_module)
        if self.average.keys() != live.keys():
            self.average = {name: tensor.clone() for name, tensor in live.items()}
        self.average = {name: tensor.to(live[name].device) for name, tensor in self.average.items()}
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # accumulating
            return
        self._step = trainer.global_step
        live = _tensors(pl_module)
        averaged = [
            name for name, tensor in live.items() if tensor.is_floating_point() and self._step > self.start_step
        ]
        torch._foreach_lerp_([self.average[name] for name in averaged], [live[n] for n in averaged], 1 - self.decay)
        for name in live.keys() - set(averaged):
            self.average[name].copy_(live[name])

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
        """Exchange the live weights and the average in place; done twice, nothing has changed."""
        if not self.average:
            return
        for name, tensor in _tensors(pl_module).items():
            kept = tensor.clone()
            tensor.copy_(self.average[name])
            self.average[name].copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average = state_dict["average"]


def _tensors(module: LightningModule) -> dict[str, Tensor]:
    """What a checkpoint would hold, each tensor once: tied weights have one average."""
    saved = module.state_dict().keys()
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach() for name, tensor in tensors if name in saved}
