"""The order of samples: a permutation, the same on any layout, resumable anywhere, each sample evaluated once."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from bigmodel.sampling import Permutation, eval_loader, micro_batches, mix, train_loader


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
    return SimpleNamespace(distributed_sampler_kwargs=share, global_step=global_step)


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


def test_mix_separates_its_numbers():
    assert len({mix(a, b) for a in range(50) for b in range(50)}) == 2500
    assert mix(1, 2) != mix(2, 1)


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
    def epoch(step, views=None):
        loader = train_loader(ByEpoch(20), batch_size=5, seed=1, trainer=process(global_step=step), views=views)
        batches = list(loader)
        (told,) = {int(e) for batch in batches for e in batch.value}
        return told, [batch.index.tolist() for batch in batches]

    assert [epoch(step)[0] for step in (0, 3, 4, 8, 9)] == [0, 0, 1, 2, 2]
    assert [epoch(step, views=2)[0] for step in (0, 4, 8, 12)] == [0, 1, 0, 1]
    assert epoch(0, views=2) == epoch(8, views=2) != epoch(4, views=2)
    assert epoch(5, views=2)[1] == epoch(4)[1][1:]
    with pytest.raises(ValueError, match=r"--data\.views 0"):
        epoch(0, views=0)


def test_workers_are_told_the_epoch_too():
    trainer = process(global_step=4)
    loader = train_loader(ByEpoch(20), batch_size=5, seed=1, trainer=trainer, num_workers=1)
    assert {int(e) for batch in loader for e in batch.value} == {1}
    trainer.global_step = 8
    assert {int(e) for batch in loader for e in batch.value} == {2}
