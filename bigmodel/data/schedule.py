"""Length of an epoch and of a run in optimizer steps, and the position in the training data after each step.

All that depends on them is computed here: the loaders' order of samples, the learning rate schedule, the state of
Lightning's loops after a resume. The position is a function of the number of optimizer steps; what a run adds to it is
an origin, which changes with its batch size or data (`DataProgress`).

N samples in an epoch, S samples per optimizer step (the batch size).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Any, cast

from lightning.pytorch import Callback, Trainer
from torch.utils.data.distributed import DistributedSampler

from bigmodel.internals import divides_samples


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
        num_samples: N, the samples that an epoch takes, from the start of its order.
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
        return max(0, self.num_samples - position.samples) // self.batch_size

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


class DataProgress(Callback):
    """Holds the position from which a trainer's loaders take their current batch size of their current samples.

    It is a callback without hooks, so that a loader finds it by its trainer.

    Attributes:
        origin: the start of the run by default. It is saved in checkpoints by `bigmodel.training.callbacks.Resume`.
    """

    origin = DataPosition()


def schedule_of(trainer: Trainer | None, num_samples: int, batch_size: int, accumulation: int) -> DataSchedule:
    """Return the positions of a trainer in its training samples.

    Args:
        trainer: None: one pass after another over all samples.
        num_samples: of the whole training split.
        batch_size: samples per optimizer step over all processes.
        accumulation: micro-batches of one process per step.
    """
    if trainer is None:
        return DataSchedule(num_samples, batch_size)
    taken = limit_steps(num_samples // batch_size, trainer.limit_train_batches, accumulation)
    if taken < num_samples // batch_size:
        num_samples = taken * batch_size
    progress = (callback for callback in cast(Any, trainer).callbacks if isinstance(callback, DataProgress))
    return DataSchedule(num_samples, batch_size, next(progress, DataProgress()).origin)


def limit_steps(num_steps: int, limit: int | float, accumulation: int) -> int:
    """Return how many of an epoch's optimizer steps the trainer's `limit_train_batches` leaves.

    Args:
        num_steps: of the whole epoch.
        limit: an integer counts micro-batches of one process, as in Lightning; a fraction is one of the steps.
        accumulation: micro-batches of one process per step.

    Raises:
        ValueError: if it leaves none.
    """
    taken = limit // accumulation if isinstance(limit, int) else int(num_steps * limit)
    if limit and num_steps and not taken:
        raise ValueError(
            f"--trainer.limit_train_batches {limit} of an epoch of {num_steps:,} optimizer steps is less than one step of"
            f" {accumulation} micro-batch(es): set a larger fraction or number"
        )
    return min(taken, num_steps)


def training_steps(trainer: Trainer) -> int:
    """Return the steps taken so far: optimizer steps; under manual optimization, training batches.

    Lightning's `global_step` counts each optimizer's steps under manual optimization: those of a GAN twice.
    """
    module: Any = getattr(trainer, "lightning_module", None)  # None before a fit
    if module is None or module.automatic_optimization:
        return trainer.global_step
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(batches.processed)


def num_steps(trainer: Trainer) -> int:
    """Return the steps (`training_steps`) of the whole run, from `max_steps` and `max_epochs`; -1 if they do not bound it.

    Under manual optimization `max_steps` counts the steps of all optimizers, an unknown number in each batch: -1.

    Lightning's own `estimated_stepping_batches` is not used: it starts to read data before a checkpoint is restored.
    """
    bounds = [trainer.max_steps] if trainer.max_steps > 0 else []
    module = getattr(trainer, "lightning_module", None)
    if bounds and module is not None and not module.automatic_optimization:
        return -1
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        source: Any = getattr(trainer, "datamodule", None) or trainer.lightning_module
        loader = source.train_dataloader()
        schedule: DataSchedule | None = getattr(loader, "schedule", None)
        if schedule is not None:
            bounds.append(schedule.steps_until(trainer.max_epochs))
        elif math.isfinite(batches := _num_batches(loader, trainer)):
            bounds.append(trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches))
    return min(bounds, default=-1)


def _num_batches(loader: Any, trainer: Trainer) -> float:
    """Return the batches of an epoch on one process, as Lightning counts them; infinite if there is no end.

    Args:
        loader: any iterable of batches, or a collection of these, of which Lightning reads all at once until the longest
            ends.
        trainer: limits the batches, and divides the samples among processes if `use_distributed_sampler` is set.
    """
    if isinstance(loader, Mapping | list | tuple):
        parts = loader.values() if isinstance(loader, Mapping) else loader
        return max((_num_batches(part, trainer) for part in parts), default=0)
    try:
        batches: float = len(loader)
    except (TypeError, NotImplementedError):  # an iterable without a length
        batches = math.inf
    sampler = getattr(loader, "sampler", None)  # without a length for an IterableDataset, which is not divided
    if divides_samples(trainer) and isinstance(sampler, Sized) and not isinstance(sampler, DistributedSampler):
        batching = loader if loader.batch_size is not None else loader.batch_sampler
        size, drop_last = getattr(batching, "batch_size", None) or 1, bool(getattr(batching, "drop_last", False))
        share = math.ceil(len(sampler) / cast(Any, trainer).distributed_sampler_kwargs["num_replicas"])
        batches = share // size if drop_last else math.ceil(share / size)
    limit = trainer.limit_train_batches
    if isinstance(limit, int):
        return min(batches, limit)
    return batches if math.isinf(batches) else int(batches * limit)
