"""A hang is told once, with the stacks of all threads; a slow run that lives is left alone."""

import re
import threading
import time

import pytest
from lightning.pytorch import Callback, Trainer
from outsider import TableData, TabularRegression

from bigmodel.training.callbacks import GradientScaling, Resume, Watchdog, watchdog


class Clock:
    """The time that was slept: whatever else the machine does takes none."""

    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(watchdog, "time", made)
    return made


class Slow(Callback):
    """Takes its time in one training step, or in each validation batch."""

    def __init__(self, clock, step=0.0, validation=0.0):
        self.clock, self.step, self.validation = clock, step, validation

    def take_a_nap(self, seconds):
        self.clock.now += seconds
        time.sleep(seconds)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 1:
            self.take_a_nap(self.step)

    def on_validation_batch_start(self, *args):
        self.take_a_nap(self.validation)


def fit(table, slow, minutes):
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=3,
        enable_checkpointing=False, callbacks=[GradientScaling(), Resume(), slow, Watchdog(minutes)],
    )  # fmt: skip
    trainer.fit(TabularRegression(), TableData(str(table), "y", batch_size=4))


def test_a_hang_is_told_once_with_all_stacks(table, clock, capfd):
    fit(table, Slow(clock, step=2.0), 0.3 / 60)
    told = capfd.readouterr().err
    line = r"no batch has ended for 0\.0\d* minutes: process 0 of 1, optimizer step 1; stacks of its threads"
    assert len(re.findall(line, told)) == 1
    assert "take_a_nap" in told
    assert "_watch" in told, "all threads, the watching one included"


def test_validation_counts_as_life_and_the_watch_ends_with_the_fit(table, clock, capfd):
    fit(table, Slow(clock, validation=0.05), 0.4 / 60)  # five batches, twice
    time.sleep(0.5)
    assert capfd.readouterr().err == ""
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]


def test_no_time_at_all_is_refused():
    with pytest.raises(ValueError, match=r"watchdog.timeout_minutes 0 must be above 0"):
        Watchdog(0)
