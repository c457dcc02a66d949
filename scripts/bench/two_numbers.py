"""The smallest task there can be: a line's slope and offset, in batches of 8 points, so that a step costs what it must."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import Dataset

from bigmodel.data.sampling import eval_loader, train_loader
from bigmodel.training import optimizers

BATCH_SIZE = 8  # points
NUM_POINTS = 1 << 20  # more than any run takes, so that no epoch ends while the clock runs


class Points(NamedTuple):
    """x [B, 1], y [B, 1] float32; index [B] int64; weight [B] float32."""

    x: Tensor
    y: Tensor
    index: Tensor  # type: ignore[assignment]
    weight: Tensor


class Line(Dataset):
    """Points of y = 2 x + 1, made where they are asked for, a batch at a time."""

    def __len__(self) -> int:
        return NUM_POINTS

    def __getitems__(self, numbers: list[int]) -> Points:
        index = torch.tensor(numbers)
        x = (index / NUM_POINTS).unsqueeze(1)
        return Points(x, 2 * x + 1, index, torch.ones(len(numbers)))


class LineData(LightningDataModule):
    """The line, for `bigmodel fit`."""

    batch_size = BATCH_SIZE

    def train_dataloader(self) -> Any:
        return train_loader(Line(), batch_size=BATCH_SIZE, trainer=self.trainer)

    def val_dataloader(self) -> Any:
        return eval_loader(Line(), batch_size=BATCH_SIZE, trainer=self.trainer)


class TwoNumbers(LightningModule):
    """Squared error of slope and offset, summed over the points."""

    def __init__(self, optimizer: optimizers.OptimizerFactory = torch.optim.AdamW) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.net = nn.Linear(1, 1)

    def configure_optimizers(self) -> Any:
        return optimizers.configure(self, self.optimizer)

    def training_step(self, batch: Points) -> dict[str, Any]:
        return {"loss": (self.net(batch.x) - batch.y).square().sum(), "count": len(batch.y)}

    def validation_step(self, batch: Points) -> None:
        self.log("val/loss", (self.net(batch.x) - batch.y).square().mean(), batch_size=len(batch.y))
