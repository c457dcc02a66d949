"""Run of `bigmodel check`: measurements at each step."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from bigmodel import run
from bigmodel.checkpoint import size_on_disk
from bigmodel.cli.findings import (
    Findings,
    check_checkpoint,
    check_processes,
    gather,
    report_memory,
    report_peak_memory,
    synchronize,
)
from bigmodel.cli.formatting import format_batch
from bigmodel.data.sampling import data_parallel_size
from bigmodel.data.schedule import num_steps, training_steps
from bigmodel.training.callbacks import Checkpoint, GradientScaling, TrainingLog
from bigmodel.training.callbacks.checkpoint import is_validation_metric
from bigmodel.training.callbacks.gradient_scaling import get_callback
from bigmodel.training.callbacks.training_log import samples_per_step
from bigmodel.training.precision import ChoosePrecision

_MAX_STEPS, _SECONDS = 20, 15.0  # maximum number of optimizer steps, and approximate duration


class Probe(run.QuietRunDirectory):
    """Callback that measures a run at each step, and ends it.

    Attributes:
        stage: the current activity, for the line that reports a failure.
        step_seconds, batch_seconds, save_seconds: of an optimizer step, a validation batch and a checkpoint; None:
            unknown.
        validation_seconds: of a whole validation, as configured; 0 without one.
        size: of a checkpoint, in bytes.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.findings = Findings(False)
        self.stage = "data"
        self.step_seconds: float | None = None
        self.batch_seconds: float | None = None
        self.save_seconds, self.size = 0.0, 0
        self.validation_seconds = 0.0
        self.written: dict[str, Any] = {}
        self.limit_val: int | float = 1.0  # as configured
        self.validated = 0  # batches
        self._begin = time.perf_counter()

    # Before the first step.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        data: Any = getattr(trainer, "datamodule", None) or pl_module  # which may have the loaders itself
        self.findings.ok("data", f"{type(data).__name__}, ready after {time.perf_counter() - self._begin:.2f} s")
        self.stage = "net"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        if trainer.world_size > 1:
            self.stage = "processes"
            check_processes(self.findings, pl_module)
        net: Any = getattr(pl_module, "net", None) or pl_module
        trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        total = sum(p.numel() for p in pl_module.parameters())
        frozen = f", {(total - trainable) / total:.1%} of them frozen" if trainable < total else ""
        self.findings.ok("net", f"{type(net).__name__}, {run.format_parameter_count(total)}{frozen}")

    def _print_summary(self, trainer: Trainer, pl_module: LightningModule) -> None:
        chooser = get_callback(trainer, ChoosePrecision)
        line = (chooser and chooser.describe(trainer, pl_module)) or trainer.precision
        self.findings.ok("precision", line.removeprefix("precision").strip())

    # Training.

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.stage = "training"
        self.checkpoints = [
            callback for callback in trainer.callbacks if isinstance(callback, Checkpoint | ModelCheckpoint)
        ]
        trainer.callbacks = [callback for callback in trainer.callbacks if callback not in self.checkpoints]
        # Validation runs after the last step, independent of the configured interval.
        self._limit_val_batches, trainer.limit_val_batches = trainer.limit_val_batches, 0
        self.every_n_epoch, trainer.check_val_every_n_epoch = trainer.check_val_every_n_epoch, 1
        self.total, self.accumulation = num_steps(trainer), trainer.accumulate_grad_batches
        self._gradients = get_callback(trainer, GradientScaling)
        self._step, self._last = 0, self.total
        self._loss: Tensor | None = None
        self._losses: list[Tensor | None] = []  # sums over a step's micro-batches on this process
        self._counts = [self._total_count()]
        self._waited = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._step == 0:
            self._ended = time.perf_counter()

    def _total_count(self) -> Tensor | None:
        counted = self._gradients.total_count if self._gradients is not None else None
        return counted.clone() if counted is not None else None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        waited = time.perf_counter() - self._ended
        self._waited += waited
        if self._step == 0 and batch_idx == 0:
            self.findings.ok("first batch", f"{format_batch(batch)}, after {1e3 * waited:.1f} ms")

    def on_train_batch_end(
        self, trainer: Any, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss")
        if loss is not None:
            self._loss = loss if self._loss is None else self._loss + loss
        if training_steps(trainer) > self._step:
            self._step = training_steps(trainer)
            self._losses.append(self._loss)
            self._counts.append(self._total_count())
            self._loss = None
            self._end_step(trainer, pl_module)
        self._ended = time.perf_counter()

    def _end_step(self, trainer: Any, pl_module: LightningModule) -> None:
        if self._step == 1:  # slow: memory is allocated, FLOPs are counted, kernels are chosen
            report_memory(self.findings, trainer, pl_module)
            synchronize(pl_module.device)
            self._start, self._waited = time.perf_counter(), 0.0
        elif self._step == 2:
            synchronize(pl_module.device)
            steps = min(_MAX_STEPS, max(3, int(_SECONDS / (time.perf_counter() - self._start))))
            last = trainer.strategy.broadcast(steps)
            self._last = min(last, self.total) if self.total > 0 else last
        if self._step == self._last:
            synchronize(pl_module.device)
            if self._step > 1:
                self._report_speed(trainer, pl_module, time.perf_counter() - self._start)
            self._report_loss(pl_module, data_parallel_size(trainer))
            self.stage = "checkpoint"
            self._check_checkpoint(trainer)
            self.stage = "validation"
            trainer.limit_val_batches = self._limit_val_batches
            trainer.should_stop = True  # after a validation

    def _report_speed(self, trainer: Trainer, pl_module: LightningModule, seconds: float) -> None:
        steps = self._step - 1
        self.step_seconds = seconds / steps
        parts = [f"{1e3 * self.step_seconds:,.1f} ms a step"]
        samples = samples_per_step(trainer)
        if samples:
            parts.append(f"{samples / self.step_seconds:,.0f} samples/s")
        counts, first, last = getattr(pl_module, "count_unit", "samples"), self._counts[1], self._counts[-1]
        if counts != "samples" and first is not None and last is not None:
            parts.append(f"{int(last - first) / seconds:,.0f} {counts}/s")
        log = get_callback(trainer, TrainingLog)
        mfu = log.mfu_of(steps * self.accumulation, seconds) if log is not None else None
        if mfu is not None:
            parts.append(f"MFU {mfu:.1%}")
        parts.append(f"{self._waited / seconds:.0%} of the time between batches (data, callbacks)")
        self.findings.ok("speed", ", ".join(parts))

    def _report_loss(self, pl_module: LightningModule, replicas: int) -> None:
        """Report the loss; Lightning has divided a micro-batch's loss by the accumulation."""
        mine = [float(loss) * self.accumulation if loss is not None else None for loss in self._losses]
        counts = [int(count) if count is not None else 0 for count in self._counts]
        if not pl_module.automatic_optimization:
            self.findings.ok("loss", "unknown: the module optimizes manually")
            return
        values = []
        for step, losses in enumerate(zip(*gather(mine), strict=True)):
            count = counts[step + 1] - counts[step] or self.accumulation * replicas
            total = (
                sum(loss for loss in losses if loss is not None) * replicas / len(losses)
            )  # processes that share a model are equal
            values.append(total / count)
        bad = next((step for step, value in enumerate(values) if not math.isfinite(value)), None)
        if bad is not None:
            self.findings.fail(
                "loss",
                f"it is {values[bad]} at step {bad + 1}: check the data, lower --model.optimizer.lr, set a longer"
                " --model.schedule.warmup_steps, or set --trainer.precision 32-true",
            )
            return
        norm = self._gradients.grad_norm if self._gradients is not None else None
        gradient = f", norm of the gradient {float(norm):.4g}" if norm is not None else ""
        self.findings.ok("loss", f"{values[0]:.4f} at step 1, {values[-1]:.4f} at step {len(values)}{gradient}")

    # The checkpoint.

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        self.written = checkpoint  # the tensors themselves: unchanged until the next step

    def _check_checkpoint(self, trainer: Trainer) -> None:
        assert self.directory is not None
        path = self.directory / "checkpoints" / f"check-{self._step}.ckpt"
        start = time.perf_counter()
        trainer.save_checkpoint(path)
        self.save_seconds = time.perf_counter() - start
        if not trainer.is_global_zero:
            return
        self.size = size_on_disk(path)
        check_checkpoint(self.findings, self.written, path, self.save_seconds)
        self.written = {}

    # Validation.

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.validated == 0:
            self._described = format_batch(batch)
            self._start = time.perf_counter()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        synchronize(pl_module.device)
        now = time.perf_counter()
        self.validated += 1
        if self.validated == 1:  # slow like a first step, and counted only if there is no other
            self.batch_seconds, self._start = now - self._start, now
        else:
            self.batch_seconds = (now - self._start) / (self.validated - 1)

    def on_validation_end(self, trainer: Any, pl_module: LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if is_validation_metric(name)}
        found = "  ".join(f"{name} {value:.5g}" for name, value in metrics.items())
        self.findings.ok("validation", f"{self._described}, {1e3 * (self.batch_seconds or 0):.1f} ms a batch; {found}")
        for callback in [*self.checkpoints, *trainer.callbacks]:
            if isinstance(callback, Checkpoint):
                callback.choose_metric(trainer)
            monitor = getattr(callback, "monitor", None)
            if monitor is not None and monitor not in trainer.callback_metrics:
                self.findings.fail(
                    "validation",
                    f"{type(callback).__name__} monitors {monitor}, which is not logged: choose one of"
                    f" {', '.join(metrics) or 'none'}, as in --callbacks.best.monitor",
                )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.validated == 0:
            self.findings.ok("validation", "none: there is no validation split, or it is disabled")
        report_peak_memory(self.findings, pl_module.device)
