"""Base class of data modules: loaders in the global order of samples, from one method that creates the data sets."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Dataset

from bigmodel.data.cache import say
from bigmodel.data.sampling import Loader, eval_loader, train_loader
from bigmodel.data.train_contents import num_trained, sketch


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

    def content_hashes(self, split: str) -> np.ndarray | None:
        """Return hashes [N] int64 of the contents of a split, after `setup`; None: not available.

        Checkpoints hold a sketch of those of the train split, and `validate` and `test` refuse contents that the run was
        trained on (`bigmodel.data.train_contents`).
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state in checkpoints: a sketch of the contents of the train split."""
        if not hasattr(self, "_train_contents"):
            hashes = self.content_hashes("train")
            self._train_contents = {} if hashes is None else {"train_contents": sketch(hashes)}
        return dict(self._train_contents)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the samples to be evaluated are not among those that the run was trained on.

        Raises:
            ValueError: if they are.
        """
        split = "val" if self.is_running(TrainerFn.VALIDATING) else "test"
        if "train_contents" not in state_dict or not (split == "val" or self.is_running(TrainerFn.TESTING)):
            return
        train, evaluated = self.content_hashes("train"), self.content_hashes(split)
        if train is None or evaluated is None:
            return
        if count := num_trained(evaluated, train, state_dict["train_contents"]):
            raise ValueError(
                f"this run was trained on contents of the {split} split of these data ({count:,} found): set --data.split,"
                " and other settings of the split, as in the run, or --data.path to other data"
            )

    def is_running(self, verb: TrainerFn) -> bool:
        """True if the trainer runs this verb."""
        return self.trainer is not None and self.trainer.state.fn == verb

    def print_line(self, line: str) -> None:
        """Print a line, from one process only."""
        if self.trainer is None or self.trainer.is_global_zero:
            say(line)
