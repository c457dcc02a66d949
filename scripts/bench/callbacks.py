"""What `bigmodel fit` carries to be measured: the clock as a callback, and the loss of each step."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from bench.common import Clock, report


class Timer(Callback):
    """Reports the speed between optimizer step `warmup` and the last.

    Args:
        warmup: optimizer steps before the clock starts.
        per_step: tokens or images in an optimizer step, to report how many a second; None: report ms per step.
    """

    def __init__(self, warmup: int, per_step: int | None = None) -> None:
        self.warmup, self.per_step = warmup, per_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock = Clock(trainer.max_steps, self.warmup)

    def on_train_batch_end(self, *args: Any) -> None:
        self.clock.tick()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.report(self.per_step)


class Losses(Callback):
    """Reports the loss of every optimizer step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]) / float(outputs["count"]))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        report(self.losses)
