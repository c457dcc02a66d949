"""The order of samples: a permutation, the same on any layout, resumable anywhere, each sample evaluated once."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from bigmodel.data.sampling import Permutation, eval_loader, micro_batches, train_loader
from bigmodel.data.schedule import DataPosition, DataProgress


class Sample(NamedTuple):
    value: torch.Tensor
    index: torch.Tensor
    weight: torch.Tensor


class Squares(Dataset):
    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Sample:
        return Sample(torch.tensor(i * i), torch.tensor(i), torch.tensor(1.0))


def process(rank: int = 0, num_processes: int = 1, global_step: int = 0) -> SimpleNamespace:
    """As much of a trainer as a loader asks for."""
    share = {"rank": rank, "num_replicas": num_processes}
    return SimpleNamespace(
        distributed_sampler_kwargs=share, global_step=global_step, callbacks=[], limit_train_batches=1.0
    )


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 1000, 4099])
def test_each_epoch_is_a_permutation_of_its_own(n):
    orders = [Permutation(n, seed, epoch)(np.arange(n)).tolist() for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    assert all(sorted(order) == list(range(n)) for order in orders)
    if n > 10:
        assert len({tuple(order) for order in orders}) == 3


def test_the_permutation_looks_random_and_needs_no_memory():
    n = 10_000
    order = Permutation(n, 3, 7)(np.arange(n))
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.03
    # Where sample 0 lands is uniform over epochs: chi-square over ten cells, 9 degrees of freedom, 27.9 is its 0.1 %.
    places = [int(np.flatnonzero(Permutation(100, 0, e)(np.arange(100)) == 0)[0]) for e in range(2000)]
    counts = np.bincount(np.array(places) // 10, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 27.9
    huge = Permutation(10**15, 0, 0)(np.arange(1000))
    assert len(set(huge.tolist())) == 1000
    assert huge.max() < 10**15


def steps_of(n, batch, micro, num_processes, global_step=0, seed=5):
    """The samples of each optimizer step to the end of the epoch, as the processes take them together."""
    loaders = [
        train_loader(
            Squares(n),
            batch_size=batch,
            micro_batch_size=micro,
            seed=seed,
            trainer=process(r, num_processes, global_step),
        )
        for r in range(num_processes)
    ]
    accumulation = micro_batches(batch, micro, num_processes)[1]
    taken = [[b.index.tolist() for b in loader] for loader in loaders]
    return [
        {i for rank in taken for micro_batch in rank[s : s + accumulation] for i in micro_batch}
        for s in range(0, len(taken[0]), accumulation)
    ]


def test_a_step_has_the_same_samples_on_any_layout():
    straight = steps_of(50, 12, None, 1)
    assert [len(step) for step in straight] == [12] * 4
    for micro, num_processes in [(4, 1), (12, 1), (None, 2), (2, 3), (1, 4)]:
        assert steps_of(50, 12, micro, num_processes) == straight


@pytest.mark.parametrize("global_step", [0, 1, 3, 4, 7])
def test_resuming_sees_what_the_straight_run_would_have_seen(global_step):
    epochs = [steps_of(50, 12, None, 1, global_step=4 * epoch) for epoch in range(2)]
    epoch, step = divmod(global_step, 4)
    assert steps_of(50, 12, 2, 3, global_step=global_step) == epochs[epoch][step:]
    assert epochs[0] != epochs[1]


def test_workers_change_nothing():
    plain = train_loader(Squares(40), batch_size=8, seed=1)
    with_workers = train_loader(Squares(40), batch_size=8, seed=1, num_workers=2)
    seen = []
    for epoch in range(2):
        plain.set_epoch(epoch)
        with_workers.set_epoch(epoch)
        batches = list(zip(plain, with_workers, strict=True))
        assert len(batches) == len(plain) == 5
        assert all(torch.equal(x, y) for a, b in batches for x, y in zip(a, b, strict=True))
        assert all(torch.equal(a.value, a.index**2) for a, _ in batches)
        seen.append([int(i) for a, _ in batches for i in a.index])
    assert seen[0] != seen[1]
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(40))


@pytest.mark.parametrize(("n", "batch", "num_processes"), [(10, 4, 3), (1, 4, 2), (12, 4, 2), (7, 100, 3), (5, 1, 2)])
def test_evaluation_counts_each_sample_once(n, batch, num_processes):
    loaders = [
        eval_loader(Squares(n), batch_size=batch, trainer=process(r, num_processes)) for r in range(num_processes)
    ]
    rows = [list(loader) for loader in loaders]
    shapes = {tuple(len(batch.index) for batch in rank) for rank in rows}
    assert len(shapes) == 1, "every process must take equal batches, for whatever they do together"
    counted = [int(i) for rank in rows for b in rank for i, w in zip(b.index, b.weight, strict=True) if w > 0]
    assert sorted(counted) == list(range(n))


def test_evaluation_takes_micro_batches_as_training_does():
    loaders = [eval_loader(Squares(20), batch_size=12, micro_batch_size=3, trainer=process(r, 2)) for r in range(2)]
    first = [next(iter(loader)).index.tolist() for loader in loaders]
    assert (first, loaders[0].samples_per_step) == ([[0, 1, 2], [3, 4, 5]], 6)


@pytest.mark.parametrize(
    ("n", "batch", "micro", "num_processes", "message"),
    [
        (50, 12, 5, 1, "12 is not a whole number of micro-batches: 1 process.* 5 = 5"),
        (50, 10, None, 4, "10 is not divisible by the 4 processes"),
        (8, 12, None, 1, "8 samples, fewer than one step of --data.batch_size 12"),
        (0, 12, None, 1, "no samples"),
        (50, 0, None, 1, "at least 1 sample"),
    ],
)
def test_what_cannot_be_divided_is_refused(n, batch, micro, num_processes, message):
    with pytest.raises(ValueError, match=message):
        train_loader(Squares(n), batch_size=batch, micro_batch_size=micro, trainer=process(0, num_processes))


class ByEpoch(Squares):
    """Tells each sample's epoch in place of its square."""

    def __getitems__(self, numbers, epoch):
        index = torch.tensor(numbers)
        return Sample(torch.full_like(index, epoch), index, torch.ones(len(index)))


def test_a_data_set_that_asks_is_told_the_epoch():
    def epoch(step, repeat=None):
        loader = train_loader(
            ByEpoch(20), batch_size=5, seed=1, trainer=process(global_step=step), num_augmentation_epochs=repeat
        )
        batches = list(loader)
        (told,) = {int(e) for batch in batches for e in batch.value}
        return told, [batch.index.tolist() for batch in batches]

    assert [epoch(step)[0] for step in (0, 3, 4, 8, 9)] == [0, 0, 1, 2, 2]
    assert [epoch(step, repeat=2)[0] for step in (0, 4, 8, 12)] == [0, 1, 0, 1]
    assert epoch(0, repeat=2) == epoch(8, repeat=2) != epoch(4, repeat=2)
    assert epoch(5, repeat=2)[1] == epoch(4)[1][1:]
    with pytest.raises(ValueError, match=r"--data\.num_augmentation_epochs 0"):
        epoch(0, repeat=0)


def test_workers_are_told_the_epoch_too():
    trainer = process(global_step=4)
    loader = train_loader(ByEpoch(20), batch_size=5, seed=1, trainer=trainer, num_workers=1)
    assert {int(e) for batch in loader for e in batch.value} == {1}
    trainer.global_step = 8
    assert {int(e) for batch in loader for e in batch.value} == {2}


def lengths_of(numbers, epoch):
    """Between 0 and 99, and others in each epoch."""
    return (numbers * 37 + epoch * 11) % 100


def grouped(n=2_000, batch=12, micro=None, num_processes=1, global_step=0):
    """[steps, batch]: the samples of each step, as the processes take them together."""
    taken = [
        [
            batch.index.tolist()
            for batch in train_loader(
                Squares(n),
                batch_size=batch,
                micro_batch_size=micro,
                seed=5,
                trainer=process(rank, num_processes, global_step),
                lengths=lengths_of,
            )
        ]
        for rank in range(num_processes)
    ]
    return np.array([part for parts in zip(*taken, strict=True) for part in parts]).reshape(-1, batch)


def test_grouping_by_length_is_that_of_the_plain_loop():
    n, batch, window = 2_000, 12, 50
    order, got = Permutation(n, 5, 0)(np.arange(n)), grouped()
    assert len(got) == n // batch
    for first in range(0, len(got), window):
        there = got[first : first + window]
        meant = order[first * batch : (first + len(there)) * batch]
        by_length = sorted(meant.tolist(), key=lambda i: lengths_of(i, 0))
        steps = [by_length[i : i + batch] for i in range(0, len(by_length), batch)]
        assert sorted(there.tolist()) == sorted(steps)
        assert there.tolist() != steps, "short ones must not all come first"


@pytest.mark.parametrize("global_step", [0, 1, 49, 50, 51, 165, 166, 200])
def test_grouped_batches_are_the_same_on_any_layout_and_after_a_resume(global_step):
    steps_per_epoch = 2_000 // 12
    epoch, step = divmod(global_step, steps_per_epoch)
    straight = grouped(global_step=epoch * steps_per_epoch)
    for micro, num_processes in [(None, 1), (2, 3), (1, 4)]:
        assert np.array_equal(grouped(2_000, 12, micro, num_processes, global_step), straight[step:])


def test_each_epoch_is_grouped_by_its_own_lengths():
    first, second = grouped(), grouped(global_step=2_000 // 12)
    assert not np.array_equal(first, second)
    spread = [np.ptp(lengths_of(steps, epoch), axis=1).mean() for epoch, steps in enumerate((first, second))]
    assert max(spread) < 5, "of 100 lengths, 50 steps share them"


def test_a_batch_size_changed_within_an_epoch_is_grouped_from_there():
    trainer, progress = process(global_step=60), DataProgress()
    progress.origin = DataPosition(step=60, epoch=0, samples=720, seen=720)
    trainer.callbacks.append(progress)
    loader = train_loader(Squares(2_000), batch_size=20, seed=5, trainer=trainer, lengths=lengths_of)
    rest = [batch.index.tolist() for batch in loader]
    assert [len(step) for step in rest] == [20] * 64
    left = Permutation(2_000, 5, 0)(np.arange(720, 2_000))
    assert sorted(i for step in rest for i in step) == sorted(left.tolist())


def test_lengths_of_samples_in_their_own_order_are_refused():
    with pytest.raises(ValueError, match="give one of the two"):
        train_loader(Squares(50), batch_size=10, shuffle=False, lengths=lengths_of)
