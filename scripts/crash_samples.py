"""Record of the samples of each optimizer step, which crash_test.py compares between layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Samples(Callback):
    """Appends a JSON line {"step", "samples"} for each micro-batch of this process to PATH/<rank>.

    It does so before the micro-batch is computed: when any process has ended a step, all have written down theirs.

    Args:
        path: a folder, one for each session.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / str(trainer.global_rank), "a") as file:
            file.write(json.dumps({"step": trainer.global_step + 1, "samples": batch.index.tolist()}) + "\n")


def read_samples(path: Path) -> dict[int, list[int]]:
    """The samples of each optimizer step of a session over all of its processes, sorted."""
    steps: dict[int, list[int]] = {}
    for part in path.iterdir():
        for line in part.read_text().splitlines():
            row = json.loads(line)
            steps.setdefault(row["step"], []).extend(row["samples"])
    return {step: sorted(samples) for step, samples in steps.items()}
