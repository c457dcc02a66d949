"""Callbacks of the benchmark for `bigmodel fit`: the clock as a callback, and the loss of each step."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from bench.common import Clock, report
from bigmodel import load
from bigmodel.training.callbacks.gradient_scaling import GradientScaling, get_callback


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


class Predicted(Callback):
    """Reports how many were predicted (items, tokens) in a second of this process's own time, from a step to the last.

    Args:
        warmup: optimizer steps before the clock starts.
    """

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step in (self.warmup, trainer.max_steps):
            gradients = get_callback(trainer, GradientScaling)
            assert gradients is not None
            now = (time.process_time(), int(gradients.total_count))  # type: ignore[arg-type]
            if trainer.global_step == self.warmup:
                self.start = now
            else:
                report((now[1] - self.start[1]) / (now[0] - self.start[0]))


class Reach(Callback):
    """Reports the seconds of this process's own time until a metric is as high as somebody else's, and ends the run.

    Args:
        metric: by name, the higher the better.
        file: JSON, the value to reach.
    """

    def __init__(self, metric: str, file: str) -> None:
        self.metric, self.file = metric, Path(file)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.value, self.start = json.loads(self.file.read_text()), time.process_time()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seconds, found = time.process_time() - self.start, float(trainer.callback_metrics[self.metric])
        print(f"epoch {trainer.current_epoch + 1}: {seconds:.1f} s, {self.metric} {found:.4f}", flush=True)
        if found >= self.value and not trainer.should_stop:
            trainer.should_stop = True
            report(seconds)


class Writes(Callback):
    """Reports what an asynchronous checkpoint costs the steps. Stands behind the callback that saves.

    Args:
        warmup: optimizer steps before the clock starts.
        every: optimizer steps between checkpoints.
        what: `ratio`: mean time of a step while one is being written, over that of a step while none is; `wait`: seconds
            by which the step that saves takes longer, for it waits until everything is copied.
    """

    def __init__(self, warmup: int, every: int, what: Literal["ratio", "wait"]) -> None:
        self.warmup, self.every, self.what = warmup, every, what
        self.saving: list[float] = []
        self.writing: list[float] = []
        self.alone: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self.folder = Path(trainer.checkpoint_callback.dirpath)
        self.written_at_start, self.start = False, time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        now, step = time.perf_counter(), trainer.global_step
        written = any(self.folder.glob(".*.partial"))
        if step > self.warmup:
            if step % self.every == 0:
                self.saving.append(now - self.start)
            elif self.written_at_start and written:
                self.writing.append(now - self.start)
            elif not self.written_at_start and not written:
                self.alone.append(now - self.start)
        self.written_at_start, self.start = written, time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.saving or not self.writing:
            raise ValueError(f"{len(self.saving)} saves and {len(self.writing)} steps beside them: too few to compare")
        alone = statistics.mean(self.alone)
        if self.what == "ratio":
            report(statistics.mean(self.writing) / alone)
        else:
            report(statistics.mean(self.saving) - alone)


class Phases(Callback):
    """Writes when each phase of a run ended, in seconds since 1970: prepare, start, train, rank.

    Args:
        file: JSON, one number by phase.
    """

    def __init__(self, file: str) -> None:
        self.file, self.ends = Path(file), dict[str, float]()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.ends["prepare"] = time.time()  # Lightning calls prepare_data before

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ends["start"] = time.time()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ends["train"] = time.time()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ends["rank"] = time.time()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.file.write_text(json.dumps(self.ends))


class Forward(Callback):
    """Has another trained task read each batch before the step, as a teacher that nobody listens to.

    Args:
        run: its run directory.
    """

    def __init__(self, run: str) -> None:
        self.run = run

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.task: Any = load(self.run).to(pl_module.device)

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        with trainer.precision_plugin.forward_context():
            self.task.logits(self.task.features(batch))


class Losses(Callback):
    """Reports the loss of every optimizer step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]) / float(outputs["count"]))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        report(self.losses)
