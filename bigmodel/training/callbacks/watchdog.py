"""Detection of a hanging process, with a dump of its stacks."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Watchdog(Callback):
    """Prints the stacks of all threads of this process to standard error if no batch has ended for too long.

    Only training and validation batches reset the timer; anything else (compiling, saving, the start) must finish
    within the same time. A hang is reported once, with process and step, and nothing is terminated: a launcher's or
    SLURM's time limits do that. Each process has its own watchdog. The cost per step is one reading of the clock.

    Args:
        timeout_minutes: minutes without a batch that count as a hang.
    """

    def __init__(self, timeout_minutes: float = 30.0) -> None:
        if timeout_minutes <= 0:
            raise ValueError(
                f"--callbacks.watchdog.timeout_minutes {timeout_minutes} must be above 0; to switch it off, set"
                " --callbacks.watchdog null"
            )
        self.timeout_minutes = timeout_minutes
        self._alive = 0.0
        self._ended: threading.Event | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._alive, self._ended = time.monotonic(), threading.Event()
        threading.Thread(target=self._watch, args=(trainer, self._ended), daemon=True, name="watchdog").start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._alive = time.monotonic()

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._alive = time.monotonic()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end()

    def _end(self) -> None:
        if self._ended is not None:
            self._ended.set()

    def _watch(self, trainer: Trainer, ended: threading.Event) -> None:
        limit, reported = self.timeout_minutes * 60, -1.0
        wait = limit
        while not ended.wait(wait):
            alive = self._alive
            silent = time.monotonic() - alive
            if silent < limit:
                wait = limit - silent
                continue
            if alive != reported:
                where = f"process {trainer.global_rank} of {trainer.world_size}, optimizer step {trainer.global_step:,}"
                head = f"no batch has ended for {silent / 60:.3g} minutes: {where}; stacks of its threads:"
                # Bypasses Python's buffers: a hanging thread may hold their lock.
                os.write(2, f"\nbigmodel: {head}\n".encode())
                faulthandler.dump_traceback(file=2, all_threads=True)
            reported, wait = alive, limit
