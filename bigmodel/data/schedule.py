"""Mapping from an optimizer step to (epoch, sample offset), across changes of batch size or data.

N samples in an epoch, S samples to an optimizer step (the batch size).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer


@dataclass(frozen=True)
class DataPosition:
    """A place in the data.

    Attributes:
        step: optimizer steps taken until there.
        epoch: the epoch it lies in, from 0.
        samples: samples of that epoch that lie before it.
        seen: samples trained on until there, over all epochs.
    """

    step: int = 0
    epoch: int = 0
    samples: int = 0
    seen: int = 0


@dataclass(frozen=True)
class DataSchedule:
    """The way of a run through its data.

    Args:
        num_samples: N.
        batch_size: S.
        origin: from where on the run takes S of these N samples; its start, unless they were changed on a resume, or
            samples were passed over.
    """

    num_samples: int
    batch_size: int
    origin: DataPosition = DataPosition()

    @property
    def steps_per_epoch(self) -> int:
        """Of a whole epoch; what does not make a last step is dropped."""
        return self.num_samples // self.batch_size

    def steps_left(self, position: DataPosition) -> int:
        """Optimizer steps from a position to the end of its epoch."""
        return (self.num_samples - position.samples) // self.batch_size

    def at(self, step: int) -> DataPosition:
        """Where the run stands after so many optimizer steps; at the end of an epoch, at the start of the next."""
        done, origin = step - self.origin.step, self.origin
        seen, left = origin.seen + done * self.batch_size, self.steps_left(origin)
        if done < left:
            return DataPosition(step, origin.epoch, origin.samples + done * self.batch_size, seen)
        epochs, steps = divmod(done - left, self.steps_per_epoch)
        return DataPosition(step, origin.epoch + 1 + epochs, steps * self.batch_size, seen)

    def steps_until(self, epoch: int) -> int:
        """Optimizer steps of the whole run until this epoch begins, from 0."""
        origin = self.origin
        if epoch <= origin.epoch:
            return origin.step
        return origin.step + self.steps_left(origin) + (epoch - origin.epoch - 1) * self.steps_per_epoch


def set_origin(trainer: Any, position: DataPosition) -> None:
    """From where on this trainer's loaders take the batch size and the samples that they have now."""
    trainer._bigmodel_origin = position


def get_origin(trainer: Trainer) -> DataPosition:
    """What `set_origin` has set; the start of a run, if nothing."""
    return getattr(trainer, "_bigmodel_origin", DataPosition())
