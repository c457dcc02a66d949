"""Mapping from an optimizer step to (epoch, sample offset), across changes of batch size or data.

N samples in an epoch, S samples per optimizer step (the batch size).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer


@dataclass(frozen=True)
class DataPosition:
    """Position in the training data.

    Attributes:
        step: optimizer steps taken before this position.
        epoch: its epoch, from 0.
        samples: samples of that epoch before this position.
        seen: samples trained on before this position, over all epochs.
    """

    step: int = 0
    epoch: int = 0
    samples: int = 0
    seen: int = 0


@dataclass(frozen=True)
class DataSchedule:
    """Positions of a run in its data, by optimizer step.

    Args:
        num_samples: N.
        batch_size: S.
        origin: the position from which the run takes S of these N samples per step; its start, unless they were changed
            on a resume, or samples were skipped.
    """

    num_samples: int
    batch_size: int
    origin: DataPosition = DataPosition()

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a whole epoch; an incomplete last step is dropped."""
        return self.num_samples // self.batch_size

    def steps_left(self, position: DataPosition) -> int:
        """Return the optimizer steps from a position to the end of its epoch."""
        return (self.num_samples - position.samples) // self.batch_size

    def at(self, step: int) -> DataPosition:
        """Return the position after `step` optimizer steps; at the end of an epoch, the start of the next."""
        done, origin = step - self.origin.step, self.origin
        seen, left = origin.seen + done * self.batch_size, self.steps_left(origin)
        if done < left:
            return DataPosition(step, origin.epoch, origin.samples + done * self.batch_size, seen)
        epochs, steps = divmod(done - left, self.steps_per_epoch)
        return DataPosition(step, origin.epoch + 1 + epochs, steps * self.batch_size, seen)

    def steps_until(self, epoch: int) -> int:
        """Return the optimizer steps of the whole run before this epoch (from 0) begins."""
        origin = self.origin
        if epoch <= origin.epoch:
            return origin.step
        return origin.step + self.steps_left(origin) + (epoch - origin.epoch - 1) * self.steps_per_epoch


def set_origin(trainer: Any, position: DataPosition) -> None:
    """Set the position from which this trainer's loaders use their current batch size and samples."""
    trainer._bigmodel_origin = position


def get_origin(trainer: Trainer) -> DataPosition:
    """Return the position set by `set_origin`; the start of the run by default."""
    return getattr(trainer, "_bigmodel_origin", DataPosition())
