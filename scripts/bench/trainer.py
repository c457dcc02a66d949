"""Hugging Face's Trainer with the clock, for all ways that are its."""

from __future__ import annotations

import tempfile
from typing import Any

from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from bench.common import BENCH, Clock


class Timer(TrainerCallback):
    """The clock, at each optimizer step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.tick()


def train(
    model: nn.Module, data: Dataset, clock: Clock, batch_size: int, collator: Any = None, **settings: Any
) -> None:
    """Train as many steps as the clock has, on a CPU, clipping to norm 1; all else as in `settings`, or at its defaults."""
    with tempfile.TemporaryDirectory(dir=BENCH) as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=clock.steps,
            per_device_train_batch_size=batch_size,
            use_cpu=True,
            max_grad_norm=1.0,
            **settings,
        )
        Trainer(model, arguments, collator, train_dataset=data, callbacks=[Timer(clock)]).train()
