"""Graceful stop on a signal: finish the optimizer step, save, and stop at the same step on all processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, callbacks

from bigmodel.data.schedule import num_steps, training_steps
from bigmodel.internals import disable_signal_handling, restore_signal_handling, stops_here, validation_due
from bigmodel.training.callbacks.checkpoint import Checkpoint

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_STEPS_TO_AGREE = 10  # several processes exchange the signal at every tenth step,
_SECONDS_TO_AGREE = 5.0  # or more often, where ten steps take longer than this: launchers kill after 30 s


class Preempted(BaseException):
    """Raised to end `Trainer.fit` after a stop signal. Not an Exception: nothing has failed.

    Attributes:
        signal: the signal received.
        saved: True if a checkpoint of this step was written; False if there is no `last` callback.
        status: `interrupted` after Ctrl-C, else `preempted`.
        exit_code: of the command, 130 after Ctrl-C, else 85.
    """

    def __init__(self, signum: int, saved: bool) -> None:
        self.signal, self.saved = signal.Signals(signum), saved
        by_hand = self.signal == signal.SIGINT
        self.status, self.exit_code = ("interrupted", 130) if by_hand else ("preempted", 85)
        super().__init__(f"{self.status} by {self.signal.name}")


class Preemption(callbacks.Checkpoint):
    """Stops a fit gracefully on SIGTERM, SIGUSR1, SIGHUP (unless under nohup) and Ctrl-C (SIGINT). Always on.

    A second Ctrl-C stops at once; further signals of the other kinds have no effect.

    The current optimizer step is finished, and so is a validation that is due after it (a signal during validation
    takes effect at its end). The first `Checkpoint` without a `monitor`, by default `last`, saves, and `Preempted` is
    raised. After a second Ctrl-C nothing is saved. With several processes, a signal to any of them suffices: they
    exchange it at every tenth optimizer step, or every few seconds if steps are long, and stop at the same step.
    Signals are handled from the first step to the last; before and after, no work would be lost, and the previous
    handlers stay in place.

    Any other end in the middle of a step (`trainer.should_stop`, as set by `max_time`) is postponed to the step's end.

    It replaces Lightning's handling of SIGTERM and its requeueing under SLURM, which would save without regard to
    validation and at another path, and the broadcast on each micro-batch that belongs to them.
    """

    # A subclass of Lightning's Checkpoint, so that it is called last: other callbacks' states then include a validation.

    def __init__(self) -> None:
        self._signal = 0  # the signal received by this process; 0: none
        self._handlers: dict[signal.Signals, Any] = {}

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            disable_signal_handling(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signal, self._prints = 0, trainer.is_global_zero
        self._stop_later = False
        self._last_step, self._step = num_steps(trainer), training_steps(trainer)
        self._next, self._agreed_step, self._agreed_at = self._step + 1, self._step, time.monotonic()
        if threading.current_thread() is threading.main_thread():  # only the main thread can set handlers
            # SIGHUP that is ignored was ignored on purpose, by nohup.
            used = [n for n in _SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
            self._handlers = {number: signal.signal(number, self._receive) for number in used}

    def _receive(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT == self._signal:
            raise KeyboardInterrupt
        if self._prints and not self._signal:
            again = "; Ctrl-C again stops at once, unsaved" if number == signal.SIGINT else ""
            what = f"\n{signal.Signals(number).name}: stopping after this optimizer step, with a checkpoint{again}\n"
            os.write(2, what.encode())  # not print, which may be what the signal interrupted
        self._signal = number

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = training_steps(trainer)
        accumulation = trainer.accumulate_grad_batches
        if accumulation > 1 and (batch_idx + 1) % accumulation and not trainer.is_last_batch:
            self._stop_later |= trainer.should_stop
            trainer.should_stop = False
        elif self._stop_later:
            self._stop_later, trainer.should_stop = False, True
        if step == self._step:  # accumulating
            return
        self._step = step
        signum = self._signal
        if trainer.world_size > 1:
            signum = self._agree(trainer) if step >= self._next else 0
        if signum and not validation_due(trainer):  # else `on_validation_end` stops
            self._stop(trainer, signum)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        signum = self._agree(trainer) if trainer.world_size > 1 else self._signal
        if signum:
            self._stop(trainer, signum)

    def _agree(self, trainer: Trainer) -> int:
        """Return the signal received by any process, and schedule the next exchange by the slowest process's speed."""
        now, steps = time.monotonic(), self._step - self._agreed_step
        seconds = (now - self._agreed_at) / steps if steps else 0.0
        own = torch.tensor([self._signal, seconds], dtype=torch.float32, device=trainer.strategy.root_device)
        signum, seconds = trainer.strategy.reduce(own, reduce_op="max").tolist()
        if steps:
            self._next = self._step + max(1, min(_STEPS_TO_AGREE, int(_SECONDS_TO_AGREE / max(seconds, 1e-6))))
            self._agreed_step, self._agreed_at = self._step, now
        return int(signum)

    def _stop(self, trainer: Any, signum: int) -> None:
        if stops_here(trainer) or self._step == self._last_step:  # the run ends anyway
            return
        last = next((c for c in trainer.callbacks if isinstance(c, Checkpoint) and c.monitor is None), None)
        if last is not None:
            last.save(trainer)
        raise Preempted(signum, saved=last is not None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore(trainer)

    def _restore(self, trainer: Any) -> None:
        for number, handler in self._handlers.items():
            if handler is not None:  # None: not installed from Python, which cannot restore it
                signal.signal(number, handler)
        self._handlers = {}
        restore_signal_handling(trainer)
