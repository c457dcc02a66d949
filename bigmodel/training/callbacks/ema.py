"""Exponential moving average of the weights (Polyak and Juditsky 1992), saved in addition to the live ones.

It is evaluated in place of the live weights.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from bigmodel.training.callbacks.averaging import WeightAverage, tensors


class EMA(WeightAverage):
    """Updates average = d * average + (1 - d) * weights after each optimizer step, and evaluates the average.

    With `warmup`, d = min(decay, (1 + t) / (10 + t)) in the update after t earlier ones, as in TensorFlow's
    ExponentialMovingAverage with `num_updates`: the initial weights do not dominate the average of a short run. Without it,
    d = decay.

    Floating-point buffers (running statistics) are averaged too, others copied. `state_dict` in a checkpoint holds the
    live weights, so that training resumes exactly; `bigmodel.load` uses the average if there is one.

    Args:
        decay: weight of the old average per optimizer step, in [0, 1).
        start_step: optimizer steps before which the average is a copy of the weights.
        warmup: begin with a smaller decay. A resumed run keeps what its config.yaml says; one that earlier versions
            wrote, without this argument, resumes without it.
    """

    def __init__(self, decay: float = 0.999, start_step: int = 0, warmup: bool = True) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"--callbacks.ema.decay {decay} must be in [0, 1)")
        self.decay = decay
        self.start_step = start_step
        self.warmup = warmup
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        live = tensors(pl_module)
        if self.average.keys() != live.keys():
            self.average = {name: tensor.clone() for name, tensor in live.items()}
        super().on_train_start(trainer, pl_module)
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # accumulating
            return
        self._step = trainer.global_step
        updates = self._step - self.start_step - 1  # earlier ones
        decay = min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay
        self._move(pl_module, 1 - decay if updates >= 0 else 1.0)
