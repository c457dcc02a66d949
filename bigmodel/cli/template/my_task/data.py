"""Pieces of Python's own source, each with the package that it comes from. T bytes in a piece, B pieces in a batch."""

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import LightningDataModule

from bigmodel.data.sampling import eval_loader, train_loader


class Piece(NamedTuple):  # a sample; a batch of them has a dimension B in front. Every task's has `index` and `weight`
    text: torch.Tensor  # [T] uint8
    target: torch.Tensor  # int64, which package
    index: torch.Tensor  # int64, which sample of its split
    weight: torch.Tensor  # float32, 1: bigmodel makes it 0 in rows that only fill up a last batch


class MyTaskData(LightningDataModule):
    """The standard library's source in pieces; every fifth file is for validation.

    Args:
        packages: those to tell apart.
        length: T, bytes in a piece.
        batch_size: pieces per optimizer step over all processes.
        micro_batch_size: pieces one process takes at once; null: its whole share of the batch.
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
                    split.append(Piece(text, torch.tensor(label), torch.tensor(len(split)), torch.tensor(1.0)))
                content.update(source)
        self.sizes = {"num_classes": len(self.packages)}  # what the net is made from: nobody types it twice
        self.fingerprint = content.hexdigest()  # a resume on other data is refused

    def train_dataloader(self):  # in an order that is the same on any number of processes, and resumes anywhere
        sizes = {"batch_size": self.batch_size, "micro_batch_size": self.micro_batch_size}
        return train_loader(self.train, **sizes, trainer=self.trainer)

    def val_dataloader(self):  # each sample exactly once
        return eval_loader(self.val, batch_size=self.batch_size, trainer=self.trainer)
