"""Time spent in the parts of a run: data, computation, waiting for other processes, validation, checkpoints."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from bigmodel.data.schedule import training_steps
from bigmodel.internals import before_fetch
from bigmodel.training.callbacks.clocks import Clock, DeviceClock, HostClock
from bigmodel.training.callbacks.gradient_scaling import GradientScaling, get_callback
from bigmodel.training.callbacks.preemption import Preempted
from bigmodel.training.callbacks.training_log import TrainingLog, samples_per_step

_OWN = ("data", "forward", "backward")  # work of one process, without waiting for others
_SLOW = 1.5  # times the median
_WORTH = 0.1  # seconds between two rows; shorter waits are not reported


class StepTimer(Callback):
    """Reports the time per part at the end of a fit (table and run.json), and the process that slows down the other ones.

    The table is that of the first process. At any moment the time is attributed to one of these parts, so that they add
    up to the total:

    * `data`: until the next batch is on the device. Zero if workers prefetch fast enough.
    * `forward`: `training_step`, and setting gradients to zero.
    * `backward`: the backward pass; under DDP including the communication that overlaps with it.
    * `communication` (DDP): communication that does not overlap with the backward pass: from this process's last
      gradient until the sums over all processes are available, including the wait for a slower process.
    * `optimizer`: scaling, clipping, the optimizer's step, the schedule.
    * `validation`, and `checkpoint`: the time that training waits for it; not the writing of an asynchronous one.
    * `other`: callbacks, logging, Lightning's loops.

    On a GPU the parts are measured by events in its stream, read once they have completed: nothing waits for them, and
    `data` is the time that the GPU waits, not the process. Elsewhere the process's clock is used. The first optimizer
    step is left out (warm-up, compilation, counting of FLOPs).

    With several processes under DDP, each row of `TrainingLog` has `speed/slowest_over_median`: the longest time of a
    process in `data`, `forward` and `backward` since the last row, over the median of all. If it exceeds 1.5 in two
    consecutive rows, by more than a tenth of a second, a line names process and host. A net with buffers (BatchNorm)
    waits for the first process in `forward`, which hides that this one is the slowest.
    """

    def __init__(self) -> None:
        self._clock: Clock | None = None  # runs from the first step to the end of training
        self._started = False  # the first step is over
        self._seconds: dict[str, float] | None = None  # at the end
        self._hooks: list[Any] = []
        self._num_steps = 0
        self._undo: list[Callable[[], object]] = []

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self._clock = DeviceClock() if pl_module.device.type == "cuda" else HostClock()
        self._mark = self._clock.mark
        self._started, self._first, self._micro_batches = False, training_steps(trainer), 0
        self._seconds = None
        self._accumulation, self._steps = trainer.accumulate_grad_batches, False
        self._measure(trainer.fit_loop.epoch_loop.val_loop, "run", "validation")
        self._measure(trainer, "save_checkpoint", "checkpoint")
        self._undo.append(before_fetch(trainer, lambda: self._mark("data")))
        self._separates = trainer.world_size > 1 and isinstance(trainer.strategy, DDPStrategy)
        if self._separates:
            self._watch_last_gradient(pl_module)
            if (log := get_callback(trainer, TrainingLog)) is not None:
                log.extra_metrics.append(self._slowest)
                self._undo.append(lambda: log.extra_metrics.remove(self._slowest))

    def _measure(self, owner: Any, method: str, part: str) -> None:
        """Attribute the time of an object's method to a part, and return to the previous part afterwards."""
        original = getattr(owner, method)

        def measured(*args: Any, **kwargs: Any) -> Any:
            with self._during(part):
                return original(*args, **kwargs)

        setattr(owner, method, measured)
        self._undo.append(lambda: delattr(owner, method))

    @contextmanager
    def _during(self, part: str) -> Iterator[None]:
        assert self._clock is not None
        before = self._clock.part
        self._mark(part)
        try:
            yield
        finally:
            self._mark(before)

    def _watch_last_gradient(self, pl_module: LightningModule) -> None:
        """Find, in the first step, the parameter whose gradient is last: DDP then waits for pending communication."""
        self._last: Tensor | None = None

        def note(parameter: Tensor) -> None:
            self._last = parameter

        parameters = [p for p in pl_module.parameters() if p.requires_grad]
        self._hooks = [p.register_post_accumulate_grad_hook(note) for p in parameters]

    # Callbacks are called in order: `step_timer` is configured before the slow ones.

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._steps = (batch_idx + 1) % self._accumulation == 0
        self._mark("forward")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._mark("backward")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark("optimizer" if self._steps else "other")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._mark("other")
        if self._started:
            self._micro_batches += 1
        elif training_steps(trainer) > self._first:
            self._start(trainer)

    def _start(self, trainer: Trainer) -> None:
        assert self._clock is not None
        self._started, self._first = True, training_steps(trainer)
        gradients = get_callback(trainer, GradientScaling)
        counted = gradients.total_count if gradients is not None else None
        self._count = None if counted is None else counted.clone()
        self._remove_hooks()
        if self._separates and self._last is not None:
            self._hooks = [self._last.register_post_accumulate_grad_hook(self._have_gradients)]
        self._own = 0.0  # seconds up to the last row
        self._suspect: int | None = None  # the slowest in the last row, if too slow
        self._reported: int | None = None
        self._clock.reset()

    def _have_gradients(self, parameter: Tensor) -> None:
        if self._steps:  # no communication while accumulating
            self._mark("communication")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer)
        self.finish()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end(trainer)
        if isinstance(exception, Preempted):
            self._print(trainer, pl_module)

    def _end(self, trainer: Trainer) -> None:
        self._num_steps = training_steps(trainer) - self._first if self._started else 0
        self._remove_hooks()
        while self._undo:
            self._undo.pop()()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def finish(self) -> dict[str, float]:
        """Stop the clock and return this process's seconds in each part, and in `total`.

        The first optimizer step is excluded; empty if there was only that one. Waits for the GPU to finish its queued
        work.
        """
        if self._clock is None or not self._started:
            return {}
        if self._seconds is None:
            self._seconds = self._clock.read()
            if not self._separates:
                self._seconds.pop("communication")
            self._seconds["total"] = sum(self._seconds.values())
        return self._seconds

    def _print(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seconds = self.finish()
        if not trainer.is_global_zero or not self._num_steps:
            return
        total = seconds["total"]
        lines = [f"time of {self._num_steps:,} steps, without the first{_whose(trainer)}"]
        lines.append(f"  {'':13}{'s':>11}{'ms a step':>12}{'%':>8}")
        for part, spent in seconds.items():
            lines.append(f"  {part:13}{spent:11,.2f}{spent / self._num_steps * 1e3:12,.2f}{spent / total:8.1%}"[:-1])
        lines.append("  " + self._speed(trainer, pl_module, total))
        if trainer.world_size > 1 and not self._separates:
            lines.append("  communication is part of forward and backward: it is measured separately only under DDP")
        print("\n".join(lines), flush=True)

    def _speed(self, trainer: Trainer, pl_module: LightningModule, total: float) -> str:
        """Format the speed over the whole time."""
        unit, done = "samples", self._num_steps * samples_per_step(trainer)
        gradients = get_callback(trainer, GradientScaling)
        counted = gradients.total_count if gradients is not None else None
        if counted is not None and self._count is not None and int(counted) > int(self._count):
            unit, done = str(getattr(pl_module, "count_unit", "samples")), int(counted) - int(self._count)
        log = get_callback(trainer, TrainingLog)
        mfu = log.mfu_of(self._micro_batches, total) if log is not None else None
        return f"{done / total:,.0f} {unit}/s" + ("" if mfu is None else f", MFU {mfu:.1%}")

    def _slowest(self, trainer: Trainer) -> dict[str, float]:
        """Return the slowest process's time over the median, for a row of the log. Called on all processes."""
        if not self._started or self._clock is None:
            return {}
        own = sum(self._clock.so_far(part) for part in _OWN)
        spent, self._own = own - self._own, own
        mine = torch.tensor([spent], dtype=torch.float32, device=trainer.strategy.root_device)
        gathered = [torch.empty_like(mine) for _ in range(trainer.world_size)]
        torch.distributed.all_gather(gathered, mine)
        each = torch.cat(gathered).tolist()
        median = statistics.median_low(each)  # of two, the faster
        if median <= 0:
            return {}
        slowest = max(range(len(each)), key=each.__getitem__)
        ratio = each[slowest] / median
        suspect = slowest if ratio > _SLOW and each[slowest] - median > _WORTH else None
        if suspect is None or suspect == self._suspect:
            if suspect is not None and suspect != self._reported:
                self._report(trainer, suspect, ratio)
            self._reported = suspect
        self._suspect = suspect
        return {"speed/slowest_over_median": ratio}

    @staticmethod
    def _report(trainer: Trainer, rank: int, ratio: float) -> None:
        hosts: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(hosts, platform.node())
        if trainer.is_global_zero:
            what = f"process {rank} on {hosts[rank]} needs {ratio:.1f} times the median time for its own work"
            print(f"step {training_steps(trainer):,}: {what}: the other processes wait for it", flush=True)


def _whose(trainer: Trainer) -> str:
    return f" (process 0 of {trainer.world_size})" if trainer.world_size > 1 else ""
