"""`num_steps` of ordinary loaders, against the optimizer steps that Lightning takes."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from bigmodel.data.schedule import num_steps


class Numbers(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(10.0)[:, None])


class SizedNumbers(Numbers):
    def __len__(self):
        return 10


def loader(n=10, **options):
    return DataLoader(TensorDataset(torch.arange(float(n))[:, None]), batch_size=3, **options)


LOADERS = {
    "plain": loader,
    "drop_last": lambda: loader(drop_last=True),
    "sized": lambda: DataLoader(SizedNumbers(), batch_size=3),
    "list": lambda: [loader(), loader(17)],
    "dict": lambda: {"a": loader(20), "b": loader(4)},
    "batches": lambda: [torch.zeros(2, 1)] * 5,
}


class Tutorial(LightningModule):
    def __init__(self, make):
        super().__init__()
        self.net, self.make = torch.nn.Linear(1, 1), make

    def training_step(self, batch):
        while not isinstance(batch, torch.Tensor):
            batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
            if batch is None:
                return self.net.weight.sum()
        return self.net(batch.reshape(-1, 1)).sum()

    def train_dataloader(self):
        return self.make()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def run(make, **options):
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Tutorial(make))
    return trainer


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 2},
        {"max_epochs": 2, "limit_train_batches": 2},
        {"max_epochs": 2, "limit_train_batches": 0.5},
        {"max_epochs": 2, "accumulate_grad_batches": 2},
        {"max_epochs": 2, "accumulate_grad_batches": 3, "limit_train_batches": 0.8},
        {"max_epochs": 3, "max_steps": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", LOADERS)
def test_steps_are_those_that_lightning_takes(name, options):
    trainer = run(LOADERS[name], **options)
    assert num_steps(trainer) == trainer.global_step


def test_a_run_over_an_iterable_without_a_length_is_bounded_by_steps_or_a_limit_alone():
    make = lambda: DataLoader(Numbers(), batch_size=3)  # noqa: E731
    assert num_steps(run(make, max_epochs=2)) == -1
    assert num_steps(run(make, max_epochs=2, max_steps=5)) == 5
    limited = run(make, max_epochs=2, limit_train_batches=2)
    assert num_steps(limited) == limited.global_step == 4


def by_batch_sampler(n, sampler=None, drop_last=False):
    data = TensorDataset(torch.arange(float(n))[:, None])
    return DataLoader(data, batch_sampler=BatchSampler(sampler or SequentialSampler(data), 4, drop_last))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("n", [10, 13])
@pytest.mark.parametrize("make", [loader, by_batch_sampler])
def test_lightning_divides_the_samples_of_an_ordinary_loader(make, n, drop_last):
    """Against a loader with torch's own sampler, as Lightning makes it."""
    whole = make(n, drop_last=drop_last)
    share = make(n, sampler=DistributedSampler(whole.dataset, num_replicas=2, rank=0), drop_last=drop_last)
    trainer = SimpleNamespace(
        max_steps=-1, max_epochs=3, world_size=2, accumulate_grad_batches=1, limit_train_batches=1.0, datamodule=None,
        distributed_sampler_kwargs={"num_replicas": 2, "rank": 0}, lightning_module=Tutorial(lambda: whole),
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=True),
    )  # fmt: skip
    assert num_steps(trainer) == 3 * len(share)
    trainer._accelerator_connector.use_distributed_sampler = False
    assert num_steps(trainer) == 3 * len(whole)
