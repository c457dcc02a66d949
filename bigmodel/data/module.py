"""Base class of data modules: loaders in the global order of samples, from one method that creates the data sets."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Dataset

from bigmodel.data.cache import say
from bigmodel.data.sampling import Loader, eval_loader, train_loader


class BaseDataModule(LightningDataModule):
    """Loaders of the splits that a subclass creates. The built-in tasks derive from it; other data modules need not.

    A subclass sets the attributes below, and `sizes` and `fingerprint` in `setup` (see `bigmodel.protocols.TaskData`).
    It defines `predict_dataloader`, as `self.evaluation_loader("all")`, if there is anything to predict.

    Attributes:
        batch_size: samples per optimizer step over all processes.
        micro_batch_size: samples per process and forward pass; None: the process's whole share of the batch.
        num_workers: processes that prefetch batches.
        seed: with the epoch, determines the order of the training samples.
    """

    batch_size: int
    micro_batch_size: int | None
    num_workers: int | None
    seed: int

    def make_dataset(self, split: str) -> Dataset[Any]:
        """Return the samples of `train`, `val`, `test`, or `all`; see `bigmodel.data.sampling.train_loader`."""
        raise NotImplementedError

    def has_validation(self) -> bool:
        """True if there is a validation split."""
        return True

    def loader_workers(self, dataset: Dataset[Any]) -> int:
        """Return the number of processes that prefetch batches of a data set."""
        return self.num_workers or 0

    def train_options(self, dataset: Any) -> dict[str, Any]:
        """Return further arguments of `bigmodel.data.sampling.train_loader`."""
        return {}

    def train_dataloader(self) -> DataLoader[Any]:
        dataset = self.make_dataset("train")
        return train_loader(
            dataset,
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size,
            seed=self.seed,
            trainer=self.trainer,
            num_workers=self.loader_workers(dataset),
            **self.train_options(dataset),
        )

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        unwanted = self.is_running(TrainerFn.FITTING) and not self.has_validation()
        return [] if unwanted else self.evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self.evaluation_loader("test")

    def evaluation_loader(self, split: str) -> Loader:
        """Return a loader of each sample of a split once."""
        dataset = self.make_dataset(split)
        return eval_loader(
            dataset,
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size,
            trainer=self.trainer,
            num_workers=self.loader_workers(dataset),
        )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move the batch to the device."""
        if device.type == "cpu":  # already there; Lightning needs 0.1 ms to find that out
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def is_running(self, verb: TrainerFn) -> bool:
        """True if the trainer runs this verb."""
        return self.trainer is not None and self.trainer.state.fn == verb

    def print_line(self, line: str) -> None:
        """Print a line, from one process only."""
        if self.trainer is None or self.trainer.is_global_zero:
            say(line)
