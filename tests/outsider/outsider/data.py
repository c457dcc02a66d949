"""A CSV file of numbers as training and validation batches. B rows, F features."""

import csv
import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import Dataset

from bigmodel.data.sampling import eval_loader, train_loader


class Rows(NamedTuple):
    """features [B, F] float32, target [B] float32, index [B] int64 (which row), weight [B] float32 (0 for padding)."""

    features: torch.Tensor
    target: torch.Tensor
    index: torch.Tensor
    weight: torch.Tensor


class Table(Dataset):
    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, i: int) -> Rows:
        return Rows(self.values[i, :-1], self.values[i, -1], torch.tensor(i), torch.tensor(1.0))


class TableData(LightningDataModule):
    """Rows of a CSV file with a header; every fifth is for validation, and all are for prediction.

    Args:
        path: the CSV file.
        target: the column to predict; the others are features.
        batch_size: rows per optimizer step over all processes.
        micro_batch_size: rows per process and forward pass.
        seed: determines the order of the rows.
    """

    def __init__(
        self, path: str, target: str, batch_size: int = 32, micro_batch_size: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.path, self.target, self.seed = path, target, seed
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size

    def setup(self, stage: str) -> None:
        text = Path(self.path).read_text()
        header, *lines = csv.reader(text.splitlines())
        if self.target not in header:
            raise ValueError(f"{self.path} has no column {self.target!r}; --data.target can be one of {header}")
        order = sorted(range(len(header)), key=lambda column: header[column] == self.target)  # the target last
        values = torch.tensor([[float(line[column]) for column in order] for line in lines])
        if stage == "predict":
            self.rows = Table(values)
            return
        validation = torch.arange(len(values)) % 5 == 4
        self.train, self.val = Table(values[~validation]), Table(values[validation])
        self.sizes = {"num_features": len(header) - 1}
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def train_dataloader(self):
        return train_loader(
            self.train,
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size,
            seed=self.seed,
            trainer=self.trainer,
        )

    def val_dataloader(self):
        return eval_loader(self.val, batch_size=self.batch_size, trainer=self.trainer)

    def predict_dataloader(self):
        return eval_loader(self.rows, batch_size=self.batch_size, trainer=self.trainer)
