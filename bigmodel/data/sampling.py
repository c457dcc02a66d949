"""Global order of samples, independent of the number of processes, and the data loaders that follow it.

An epoch is a keyed permutation of the N samples: a pure function of (seed, epoch) in constant memory. One optimizer
step takes the next S samples of it (the batch size, over all processes); process r of W takes them in A micro-batches
of M::

    position of row i in micro-batch a of process r in step s  =  s S + (a W + r) M + i,      S = A W M

so the samples of a step do not depend on W or M, and the position in the epoch depends only on the number of optimizer
steps taken (`data.schedule`; s S becomes the samples taken so far, if the batch size was changed). A last, incomplete
step of an epoch is dropped (its samples appear in other epochs).

Batches of samples of different lengths waste computation on padding. If lengths are given, the samples of each 50 steps
are sorted by length, cut into steps, and the steps shuffled by a key: again a function of (seed, epoch) alone, in
memory for 50 steps. If the batch size was changed within an epoch, the rest of that epoch is grouped anew from there:
of 50 steps' samples, some may then appear twice in that epoch, and others not at all.

Source of the permutation: a balanced Feistel network (Luby and Rackoff 1988) over the smallest even number of bits that
holds N, with cycle walking (Black and Rogaway 2002).
"""

from __future__ import annotations

import inspect
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sized
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from bigmodel.data.schedule import DataSchedule, schedule_of
from bigmodel.data.stateless_rng import hash_seed

_ROUNDS = 6
_STEPS_AT_ONCE = 32  # sample numbers are computed for so many steps at once: the cost is mostly per call
_STEPS_GROUPED = 50  # samples of so many steps are sorted by length together
_PADDING = -1  # the sample number of a padding row


class Permutation:
    """Keyed permutation of range(n), evaluated at the given positions, never stored.

    Args:
        n: the size of the permutation.
        seed: the first half of the key.
        epoch: the second half of the key; each epoch has a different order.
    """

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self._half = np.uint64((bits + 1) // 2)
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = [np.uint64(hash_seed(seed, epoch, r)) for r in range(_ROUNDS)]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Return the sample numbers [k] int64 at the positions [k], each in range(n)."""
        numbers = self._encrypt(positions.astype(np.uint64))
        while (outside := numbers >= self.n).any():  # the expected cycle walk is shorter than 4 steps
            numbers[outside] = self._encrypt(numbers[outside])
        return numbers.astype(np.int64)

    def _encrypt(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._half, x & self._mask
        with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is intended
            for key in self._keys:
                f = (right ^ key) * np.uint64(0xBF58476D1CE4E5B9)
                f = (f ^ f >> np.uint64(29)) * np.uint64(0x94D049BB133111EB)
                left, right = right, left ^ (f >> np.uint64(32)) & self._mask
        return left << self._half | right


def micro_batches(batch_size: int, micro_batch_size: int | None, num_processes: int) -> tuple[int, int]:
    """Return the micro-batch size of one process, and the number of micro-batches per optimizer step.

    Args:
        batch_size: samples per optimizer step over all processes.
        micro_batch_size: samples per process and forward pass; None: the process's whole share of the batch.
        num_processes: processes that hold different data.

    Raises:
        ValueError: if the batch is not a whole number of micro-batches on every process.
    """
    if batch_size < 1:
        raise ValueError(f"--data.batch_size {batch_size}: at least 1 sample per optimizer step is needed")
    if micro_batch_size is None:
        if batch_size % num_processes:
            raise ValueError(
                f"--data.batch_size {batch_size} is not divisible by the {num_processes} processes; it counts the"
                f" samples per optimizer step over all of them: choose a multiple of {num_processes}"
            )
        return batch_size // num_processes, 1
    if micro_batch_size < 1:
        raise ValueError(f"--data.micro_batch_size {micro_batch_size} must be at least 1 or null")
    if batch_size % (at_once := micro_batch_size * num_processes):
        raise ValueError(
            f"--data.batch_size {batch_size} is not a whole number of micro-batches: {num_processes} process(es) times"
            f" --data.micro_batch_size {micro_batch_size} = {at_once} samples at once; choose a multiple of {at_once}"
        )
    return micro_batch_size, batch_size // (micro_batch_size * num_processes)


_Numbers = tuple[int, list[int]]  # the epoch that seeds randomness, and sample numbers
Lengths = Callable[[np.ndarray, int], np.ndarray]  # of samples [k] in an epoch, [k]


class _TrainOrder(Sampler[_Numbers]):
    """Batch sampler of one process, from the current optimizer step to the end of its epoch."""

    def __init__(
        self,
        n: int,
        batch_size: int,
        micro_batch_size: int | None,
        seed: int,
        trainer: Trainer | None,
        shuffle: bool,
        num_augmentation_epochs: int | None,
        lengths: Lengths | None,
    ) -> None:
        self.rank, self.num_processes = _place(trainer)
        self.micro, self.accumulation = micro_batches(batch_size, micro_batch_size, self.num_processes)
        if n < batch_size:
            raise ValueError(
                f"the training split has {n:,} samples, fewer than one step of --data.batch_size {batch_size:,};"
                " give more data or a smaller batch size"
            )
        if num_augmentation_epochs is not None and num_augmentation_epochs < 1:
            raise ValueError(
                f"--data.num_augmentation_epochs {num_augmentation_epochs}: at least 1 is needed;"
                " leave it out for new randomness in every epoch"
            )
        if lengths is not None and not shuffle:
            raise ValueError("shuffle=False keeps the samples' own order, but lengths group them: give one of the two")
        self.n, self.batch_size, self.seed, self.shuffle = n, batch_size, seed, shuffle
        self.num_augmentation_epochs, self.lengths = num_augmentation_epochs, lengths
        self.trainer = trainer
        self.epoch = 0  # for use without a trainer

    @property
    def schedule(self) -> DataSchedule:
        """Positions of the trainer in these samples."""
        return schedule_of(self.trainer, self.n, self.batch_size, self.accumulation)

    def __len__(self) -> int:
        return self.n // self.batch_size * self.accumulation  # the trainer limits it

    def __iter__(self) -> Iterator[_Numbers]:
        # Computed here, not at the first next(): by then a loader's workers have prefetched.
        if self.trainer is None:
            return self._from(self.epoch, 0, 0, self.n)
        schedule = self.schedule
        here, origin = schedule.at(self.trainer.global_step), schedule.origin
        overfit = getattr(self.trainer, "overfit_batches", 0)  # the same samples in each epoch
        epoch = 0 if overfit else here.epoch
        return self._from(
            epoch, here.samples, origin.samples if here.epoch == origin.epoch else 0, schedule.num_samples
        )

    def _from(self, epoch: int, start: int, origin: int, stop: int) -> Iterator[_Numbers]:
        """Yield an epoch's samples from `start` to `stop`, in steps of this batch size counted from `origin`."""
        first, num_steps = (start - origin) // self.batch_size, (stop - origin) // self.batch_size
        if self.num_augmentation_epochs is not None:
            epoch %= self.num_augmentation_epochs
        order = Permutation(self.n, self.seed, epoch)
        at_once = _STEPS_AT_ONCE if self.lengths is None else _STEPS_GROUPED
        for block in range(first - first % at_once, num_steps, at_once):
            steps = np.arange(block, min(block + at_once, num_steps))
            positions = origin + steps[:, None] * self.batch_size + np.arange(self.batch_size)  # [steps, S]
            if self.lengths is None:
                numbers = self._own(positions)[max(first - block, 0) :]  # [steps, A, M]
                numbers = order(numbers.ravel()) if self.shuffle else numbers
            else:
                samples = order(positions.ravel())
                grouped = self._grouped(samples, self.lengths(samples, epoch), epoch, block)
                numbers = self._own(grouped)[max(first - block, 0) :]
            yield from ((epoch, batch) for batch in numbers.reshape(-1, self.micro).tolist())

    def _own(self, steps: np.ndarray) -> np.ndarray:
        """Return this process's micro-batches [steps, A, M] of steps [steps, S]."""
        dealt: np.ndarray = steps.reshape(-1, self.accumulation, self.num_processes, self.micro)[:, :, self.rank]
        return dealt

    def _grouped(self, numbers: np.ndarray, lengths: np.ndarray, epoch: int, block: int) -> np.ndarray:
        """Return the same sample numbers as steps [steps, S] of similar length."""
        by_length = numbers[np.argsort(lengths, kind="stable")].reshape(-1, self.batch_size)  # [steps, S]
        turns = Permutation(len(by_length), hash_seed(self.seed, epoch), block)(np.arange(len(by_length)))
        grouped: np.ndarray = by_length[turns]
        return grouped


class _EvaluationOrder(Sampler[_Numbers]):
    """Batch sampler that covers the samples once, in order.

    Every process gets the same number of equal batches, filled with padding rows.
    """

    epoch = 0  # the epoch that seeds the samples' randomness

    def __init__(self, n: int, batch_size: int, trainer: Trainer | None) -> None:
        self.rank, self.num_processes = _place(trainer)
        self.n, self.batch_size = n, batch_size
        # A data set smaller than a batch is not padded to the batch size.
        self.rows = max(1, min(batch_size // self.num_processes, -(-n // self.num_processes)))

    def __len__(self) -> int:
        return -(-self.n // (self.rows * self.num_processes))

    def __iter__(self) -> Iterator[_Numbers]:
        for batch in range(len(self)):
            start = (batch * self.num_processes + self.rank) * self.rows
            yield self.epoch, [i if i < self.n else _PADDING for i in range(start, start + self.rows)]


class _NodeOrder(_EvaluationOrder):
    """Evaluation order split over the processes of each node; each node covers all samples.

    The batch size does not depend on the number of processes, so that a net computes the same bits for a sample on any
    number.
    """

    def __init__(self, n: int, rows: int, epoch: int, trainer: Trainer | None) -> None:
        self.rank, self.num_processes = (trainer.local_rank, trainer.num_devices) if trainer is not None else (0, 1)
        self.n, self.rows, self.epoch = n, rows, epoch
        self.batch_size = rows * self.num_processes


def _place(trainer: Trainer | None) -> tuple[int, int]:
    """Return the index of this process's share of the data, and the number of shares.

    Processes that share a model share its data.
    """
    share = trainer.distributed_sampler_kwargs if trainer is not None else None
    return (share["rank"], share["num_replicas"]) if share else (0, 1)


def data_parallel_size(trainer: Trainer) -> int:
    """Return the number of processes with different samples; with tensor parallelism, of groups that share a model."""
    return _place(trainer)[1]


def data_parallel_rank(trainer: Trainer) -> int:
    """Return the index of this process, or of its group, among the groups with different samples."""
    return _place(trainer)[0] if trainer.distributed_sampler_kwargs else trainer.global_rank


class _BatchFetcher(Dataset[Any]):
    """Dataset that maps sample numbers to one batch; runs in a loader's workers."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset
        self.fetch = getattr(dataset, "__getitems__", None)
        self.by_epoch = self.fetch is not None and "epoch" in inspect.signature(self.fetch).parameters

    def __getitems__(self, epoch_and_numbers: _Numbers) -> Any:
        epoch, numbers = epoch_and_numbers
        rows = [max(number, 0) for number in numbers]
        if self.fetch is None:
            batch = default_collate([self.dataset[i] for i in rows])
        else:
            batch = self.fetch(rows, epoch=epoch) if self.by_epoch else self.fetch(rows)
        if _PADDING in numbers:
            kept = torch.tensor([number != _PADDING for number in numbers])
            batch = batch._replace(weight=batch.weight * kept)
        return batch


class Loader(DataLoader[Any]):
    """DataLoader that Lightning can stop and resume anywhere in an epoch. Created by the functions below."""

    def __init__(self, dataset: Dataset[Any], order: _TrainOrder | _EvaluationOrder, num_workers: int) -> None:
        super().__init__(
            _BatchFetcher(dataset),
            batch_sampler=cast(Any, order),  # it yields the epoch and the list
            num_workers=num_workers,
            collate_fn=_as_is,
            worker_init_fn=_ignore_termination_signals,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
        )
        self.order = order
        self.samples_per_step = order.batch_size  # over all processes
        self.num_samples = order.n

    @property
    def schedule(self) -> DataSchedule | None:
        """Positions of the trainer in the training samples; None for evaluation."""
        return self.order.schedule if isinstance(self.order, _TrainOrder) else None

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass, for use without a trainer."""
        if isinstance(self.order, _TrainOrder):
            self.order.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """Return the number of samples that the optimizer has consumed.

        The existence of this method marks the loader as resumable for Lightning; the position itself follows from the
        trainer's optimizer step, which the checkpoint restores, and from `data.schedule.DataProgress`.
        """
        order = self.order
        if isinstance(order, _EvaluationOrder) or order.trainer is None:
            return {}
        return {"samples": order.schedule.at(order.trainer.global_step).seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Do nothing, see `state_dict`."""


def _as_is(batch: Any) -> Any:
    return batch


def _ignore_termination_signals(worker: int) -> None:
    """Ignore stop signals in a DataLoader worker, so that the current optimizer step can finish.

    SIGTERM ends it only if the training process sends it; where its sender is unknown (macOS), the second one does.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True, name="sigterm").start()


def _end_with_parent(parent: int) -> None:
    """End this process when its parent sends SIGTERM, or has ended and another process does."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent == os.getppid():
        pass
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.kill(os.getpid(), signal.SIGTERM)


def _num_samples(dataset: Dataset[Any], split: str) -> int:
    n = len(cast(Sized, dataset))
    if n == 0:
        raise ValueError(f"the {split} split has no samples")
    return n


def train_loader(
    dataset: Dataset[Any],
    *,
    batch_size: int,
    micro_batch_size: int | None = None,
    seed: int | None = None,
    trainer: Trainer | None = None,
    num_workers: int = 0,
    shuffle: bool = True,
    num_augmentation_epochs: int | None = None,
    lengths: Lengths | None = None,
) -> Loader:
    """Return a loader of training batches in the global order, resumable at any step on any number of processes.

    Args:
        dataset: has `__len__`, and `__getitem__(i)`: one sample as a NamedTuple with the fields `index` (its number)
            and `weight` (1.0) among its own; or, faster, `__getitems__(numbers)`: a whole batch as such a NamedTuple of
            tensors. If that has a parameter `epoch`, it is passed, so that a sample's randomness can depend on it.
        batch_size: samples per optimizer step over all processes.
        micro_batch_size: samples per process and forward pass; None: the process's whole share.
        seed: with the epoch, determines the order; None: the run's `seed_everything`, 0 without one.
        trainer: the data module's `self.trainer`; None: one process, and `set_epoch` sets the epoch.
        num_workers: worker processes that prefetch; 0: read in the training process.
        shuffle: False keeps the samples' own order in every epoch.
        num_augmentation_epochs: the epochs' randomness, order included, repeats after this number of epochs; None: never.
        lengths: maps sample numbers [k] and an epoch to the samples' lengths [k]; batches are then of samples of
            similar length. None: lengths are not used.

    Raises:
        ValueError: if the batch cannot be divided as configured, or the data set is smaller than one batch.
    """
    n = _num_samples(dataset, "training")
    if seed is None:  # Lightning sets the variable, in all processes
        seed = int(os.environ.get("PL_GLOBAL_SEED") or 0)
    order = _TrainOrder(n, batch_size, micro_batch_size, seed, trainer, shuffle, num_augmentation_epochs, lengths)
    return Loader(dataset, order, num_workers)


def eval_loader(
    dataset: Dataset[Any],
    *,
    batch_size: int,
    micro_batch_size: int | None = None,
    trainer: Trainer | None = None,
    num_workers: int = 0,
) -> Loader:
    """Return a loader of each sample exactly once, over all processes; padding rows of a last batch have weight 0.

    Args:
        dataset: as for `train_loader`.
        batch_size: samples per batch over all processes.
        micro_batch_size: samples per process and forward pass, as in training; None: the process's share of the batch.
        trainer: the data module's `self.trainer`; None: one process.
        num_workers: worker processes that prefetch.

    Raises:
        ValueError: if the data set is empty.
    """
    if micro_batch_size:
        batch_size = micro_batch_size * _place(trainer)[1]
    return Loader(dataset, _EvaluationOrder(_num_samples(dataset, "evaluation"), batch_size, trainer), num_workers)


def sequential_loader(loader: DataLoader[Any], *, rows: int, trainer: Trainer | None = None, epoch: int = 0) -> Loader:
    """Return a loader of another loader's samples (such as training samples), once and in their own order.

    Used to cache a frozen net's outputs (`bigmodel.data.output_cache`). Each node covers all samples, in batches
    divided among its processes.

    Args:
        loader: created by this module.
        rows: samples per batch of one process; a smaller batch is padded with rows of weight 0.
        trainer: the data module's `self.trainer`; None: one process.
        epoch: the epoch that seeds the samples' randomness, if the data set has any.

    Raises:
        ValueError: if the loader was not created by this module.
    """
    if not isinstance(loader, Loader):
        raise ValueError(
            f"the samples of a {type(loader).__name__} have no order of their own: make it with"
            " bigmodel.data.sampling.train_loader"
        )
    samples = cast(_BatchFetcher, loader.dataset)
    return Loader(samples.dataset, _NodeOrder(loader.num_samples, rows, epoch, trainer), loader.num_workers)
