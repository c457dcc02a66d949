"""Chunks of source code of Python's standard library, labelled with their package. T bytes per chunk, B batch size."""

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import LightningDataModule

from bigmodel.data.sampling import eval_loader, train_loader


class Chunk(NamedTuple):  # a sample; a batch adds a first dimension B. Every task needs `index` and `weight`
    text: torch.Tensor  # [T] uint8
    target: torch.Tensor  # int64, number of the package
    index: torch.Tensor  # int64, number of the sample in its split
    weight: torch.Tensor  # float32, 1; bigmodel sets it to 0 in padding rows of a last batch


class MyTaskData(LightningDataModule):
    """Source code of the standard library in chunks; every fifth file is for validation.

    Args:
        packages: the classes.
        length: T, bytes per chunk.
        batch_size: chunks per optimizer step over all processes.
        micro_batch_size: chunks per process and forward pass; null: the process's whole share of the batch.
    """

    def __init__(self, packages: list[str], length: int, batch_size: int, micro_batch_size: int | None = None) -> None:
        super().__init__()
        self.packages, self.length = packages, length
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size

    def setup(self, stage: str) -> None:
        self.train, self.val, content, T = [], [], hashlib.sha256(), self.length
        for label, package in enumerate(self.packages):
            for number, file in enumerate(sorted(Path(sysconfig.get_path("stdlib"), package).glob("*.py"))):
                split, source = self.val if number % 5 == 4 else self.train, file.read_bytes()
                for start in range(0, len(source) - T + 1, T):
                    text = torch.tensor(list(source[start : start + T]), dtype=torch.uint8)
                    split.append(Chunk(text, torch.tensor(label), torch.tensor(len(split)), torch.tensor(1.0)))
                content.update(source)
        self.sizes = {"num_classes": len(self.packages)}  # arguments of the net
        self.fingerprint = content.hexdigest()  # a resume with different data is refused

    def train_dataloader(self):  # in an order that follows from `seed_everything`, on any number of processes
        sizes = {"batch_size": self.batch_size, "micro_batch_size": self.micro_batch_size}
        return train_loader(self.train, **sizes, trainer=self.trainer)

    def val_dataloader(self):  # each sample exactly once
        return eval_loader(self.val, batch_size=self.batch_size, trainer=self.trainer)
