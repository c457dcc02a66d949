"""Progress display: a bar on a terminal, plain lines elsewhere; redrawn at time intervals, at low cost per step."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from bigmodel.data.schedule import num_steps, training_steps
from bigmodel.data.text import printable
from bigmodel.training.callbacks.checkpoint import Checkpoint, is_validation_metric
from bigmodel.training.callbacks.gradient_scaling import get_callback
from bigmodel.training.callbacks.training_log import TrainingLog

_MAX_METRICS, _NUM_SHOWN = 10, 6  # on a line: all, up to _MAX_METRICS; else _NUM_SHOWN


class ProgressLine(ProgressBar):
    """Shows step, loss, speed and time left during training, and the metrics of each validation on a permanent line.

    During `bigmodel validate`, `test` and `predict` it shows the number of batches done. If there are more than ten
    metrics, six are shown: the one that selects the best checkpoint, and those related to it.

    Args:
        every_n_seconds: seconds between lines if the output is not a terminal. A terminal's bar is redrawn twice a
            second.
    """

    def __init__(self, every_n_seconds: float = 10.0) -> None:
        super().__init__()
        self.every_n_seconds = every_n_seconds
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=not sys.stdout.isatty())
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._enabled = True
        self._next = 0.0

    def disable(self) -> None:
        """Disable output; Lightning calls this on every process but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Enable output again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print a line above the bar, for the task's own messages."""
        if self._enabled:
            self._console.print(*args, **kwargs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._total = num_steps(trainer)
        self._log = get_callback(trainer, TrainingLog)
        self._count_unit = str(getattr(pl_module, "count_unit", "samples"))
        self._start_step, self._start_time = training_steps(trainer), time.monotonic()
        self._next = self._start_time
        if self._enabled and self._console.is_terminal:
            self._start_bar("training", self._total if self._total > 0 else None, training_steps(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if now < self._next or not self._enabled:
            return
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=training_steps(trainer), metrics=self._summary(trainer))
            self._bar.refresh()
            self._next = now + 0.5
        elif self._log is None or self._log.latest:
            line = f"step {training_steps(trainer):,}{self._of_total(trainer, now)}  {self._summary(trainer)}"
            self._console.print(printable(line), markup=False)
            self._next = now + self.every_n_seconds

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_bar()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._start_evaluation("validating", trainer.num_val_batches)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_evaluation("testing", trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_evaluation("predicting", trainer.num_predict_batches)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn != "fit":
            self._show_evaluation()

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._show_evaluation()

    def on_predict_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._show_evaluation()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_evaluation()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_evaluation()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop_bar()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.training or (trainer.state.fn == "fit" and not trainer.sanity_checking):
            metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if is_validation_metric(k)}
            line = f"step {training_steps(trainer):,}  {_line(metrics, _monitored(trainer))}"
            self.print(printable(line), markup=False)
        if trainer.state.fn != "fit":
            self._end_evaluation()

    def _start_evaluation(self, name: str, num_batches: Sequence[int | float]) -> None:
        self._evaluating, self._total, self._done = name, int(sum(num_batches)), 0
        self._next = time.monotonic() + self.every_n_seconds
        if self._enabled and self._console.is_terminal:
            self._start_bar(name, self._total, 0)
            self._next = 0.0

    def _show_evaluation(self) -> None:
        self._done += 1
        now = time.monotonic()
        if now < self._next or not self._enabled:
            return
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done)
            self._bar.refresh()
            self._next = now + 0.5
        else:
            self._console.print(f"{self._evaluating}  {self._done:,} of {self._total:,} batches")
            self._next = now + self.every_n_seconds

    def _end_evaluation(self) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done)
        self._stop_bar()

    def _of_total(self, trainer: Trainer, now: float) -> str:
        done = training_steps(trainer) - self._start_step
        if self._total < 0 or done == 0:
            return ""
        left = (now - self._start_time) / done * (self._total - training_steps(trainer))
        return f" of {self._total:,}, {int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d} left"

    def _summary(self, trainer: Trainer) -> str:
        row = self._log.latest if self._log is not None else {}
        parts = [f"loss {row['train/loss']:.4f}"] if "train/loss" in row else []
        if not parts:  # manual optimization: what the module logs with prog_bar=True
            parts = [f"{name} {float(value):.4f}" for name, value in trainer.progress_bar_metrics.items()]
        for unit in dict.fromkeys((self._count_unit, "samples")):
            if f"speed/{unit}_per_s" in row:
                parts.append(f"{row[f'speed/{unit}_per_s']:,.0f} {unit}/s")
                break
        if "speed/mfu" in row:
            parts.append(f"MFU {row['speed/mfu']:.1%}")
        return "  ".join(parts)

    def _start_bar(self, name: str, total: int | None, completed: int) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
        )
        self._bar = Progress(*columns, console=self._console, auto_refresh=False)
        self._task = self._bar.add_task(name, total=total, completed=completed, metrics="")
        self._bar.start()

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.refresh()
            self._bar.stop()
            self._bar = self._task = None


def _monitored(trainer: Trainer) -> str:
    """Return the metric that selects the best checkpoint; empty if there is none."""
    metrics = (one.monitor for one in trainer.checkpoint_callbacks if isinstance(one, Checkpoint) and one.monitor)
    return next(metrics, "")


def _line(metrics: dict[str, float], monitored: str) -> str:
    """Format all metrics if they are few; else the monitored one, the loss, those of the same cutoff (`@10`), others."""

    def cutoff(name: str) -> str:
        return name.partition("@")[2]

    names, more = list(metrics), ""
    if len(names) > _MAX_METRICS:
        names.sort(key=lambda name: (name != monitored, name != "val/loss", cutoff(name) != cutoff(monitored)))
        names, more = names[:_NUM_SHOWN], f"  and {len(names) - _NUM_SHOWN} more in metrics.csv"
    return "  ".join(f"{name} {metrics[name]:.5g}" for name in names) + more
