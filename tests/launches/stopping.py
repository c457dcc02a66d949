"""Runs stopped by a signal, on two processes: `python forked.py 2 stopping.py TABLE`, in an empty folder.

Run by test_preemption.py. Only the second process receives the signal.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from outsider import TabularRegression
from torch import nn

from bigmodel.cli import main
from bigmodel.training.callbacks import Resume
from bigmodel.training.callbacks.preemption import Preemption
from bigmodel.training.optimizers import OptimizerFactory


class SendSignal(Callback):
    """Sends its own process a signal after so many batches of a kind, once.

    Args:
        batches: 1 is the first batch of this session.
        number: the signal's name.
        during: `train`: within the step, before its backward pass; `validation`: within it.
        rank: the process that receives it.
        times: number of signals sent at once.
    """

    def __init__(
        self, batches: int, number: str = "SIGTERM", during: str = "train", rank: int = 0, times: int = 1
    ) -> None:
        self.left, self.number, self.during, self.rank, self.times = batches, number, during, rank, times

    def _count(self, trainer):
        self.left -= 1
        if self.left == 0 and trainer.global_rank == self.rank:
            for _ in range(self.times):
                os.kill(os.getpid(), getattr(signal, self.number))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.during == "train":
            self._count(trainer)

    def on_validation_batch_start(self, trainer, *args):
        if self.during == "validation" and not trainer.sanity_checking:
            self._count(trainer)


class SignalParent(SendSignal):
    """Sends the signal to the launcher, which must forward it."""

    def _count(self, trainer):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getppid(), getattr(signal, self.number))
            preemption = next(callback for callback in trainer.callbacks if isinstance(callback, Preemption))
            while not preemption._signal:  # without a signal, the run hangs until the test ends it
                time.sleep(0.01)


class Die(Callback):
    """Fails, as a process that is killed, at the start of an optimizer step once the run has gone back so many times."""

    def __init__(self, step: int, returns: int) -> None:
        self.step, self.returns = step, returns

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        returns = next(callback.num_returns for callback in trainer.callbacks if isinstance(callback, Resume))
        if (trainer.global_step + 1, returns) == (self.step, self.returns):
            raise RuntimeError("killed")


class Slow(Callback):
    """One process sleeps in the forward pass of each step.

    Args:
        seconds: how long.
        rank: the process.
    """

    def __init__(self, seconds: float, rank: int) -> None:
        self.seconds, self.rank = seconds, rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == self.rank:
            time.sleep(self.seconds)


class StopAfter(Callback):
    """Ends the run by `trainer.should_stop` in a micro-batch."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.left -= 1
        trainer.should_stop |= self.left == 0


class Manual(TabularRegression):
    """Manual optimization with two steps in a batch, so that no save is due at the last step."""

    def __init__(
        self, net: Callable[[int], nn.Module], optimizer: OptimizerFactory = torch.optim.AdamW, schedule: Any = None
    ) -> None:
        super().__init__(net, optimizer, None)
        self.automatic_optimization = False

    def training_step(self, batch):
        for _ in range(2):
            self.optimizers().zero_grad()
            loss = (self.net(batch.features) - batch.target).square().mean()
            self.manual_backward(loss)
            self.optimizers().step()


def experiment(table, runs_dir, *flags):
    """Arguments of `bigmodel fit`: 30 steps of 12 rows, with dropout and average, validated every third step."""
    arguments = [
        "-c",
        Path(__file__).parents[1] / "outsider" / "experiment.yaml",
        "--data.path",
        table,
        "--runs_dir",
        runs_dir,
    ]
    settings = {
        "data.batch_size": 12, "model.net.dropout": 0.2, "trainer.accelerator": "cpu", "trainer.max_epochs": "null",
        "trainer.max_steps": 30, "trainer.val_check_interval": 3, "trainer.log_every_n_steps": 1,
        "callbacks.ema": "bigmodel.training.callbacks.EMA", "callbacks.ema.decay": 0.9,
    }  # fmt: skip
    arguments += [part for key, value in settings.items() for part in (f"--{key}", value)]
    return [str(part) for part in (*arguments, *flags)]


def send_signal(**options):
    """Flags that add a `SendSignal`."""
    flags = ["--callbacks.signal", "stopping.SendSignal"]
    return [*flags, *(str(part) for key, value in options.items() for part in (f"--callbacks.signal.{key}", value))]


def returning(every):
    """Flags of a run that rolls back after a non-finite loss, and saves every so many steps."""
    arguments = ["--callbacks.anomalies.on_nonfinite", "rollback", "--callbacks.last.every_n_minutes", "null"]
    return [*arguments, "--callbacks.last.every_n_steps", str(every)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    (table,) = sys.argv[1:]
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.micro_batch_size", "3"]
    main(["fit", *experiment(table, "straight", *two)])
    try:
        main(["fit", *experiment(table, "stopped", *two, *send_signal(batches=8, number="SIGUSR1", rank=1))])
    except SystemExit as stopped:
        Path(f"exit.{os.environ['RANK']}").write_text(str(stopped.code))
    main(["fit", "--runs_dir", "stopped", "--resume", "last", "--callbacks.signal", "null"])
    without = ["--trainer.limit_val_batches", "0", "--model.net.dropout", "0"]
    main(["fit", *experiment("spoiled.csv", "skipping", *two, *without), "--callbacks.anomalies.on_nonfinite", "skip"])
    main(["fit", *experiment("spoiled.csv", "returning", *two, *without, *returning(1), "--trainer.max_steps", 14)])
    slow = ["--callbacks.slow", "stopping.Slow", "--callbacks.slow.seconds", "0.2", "--callbacks.slow.rank", "1"]
    slow += ["--trainer.log_every_n_steps", "3", "--trainer.max_steps", "9"]
    main(["fit", *experiment(table, "slow", *two), *slow])
