"""Regression of a number from numbers. B rows, F features."""

from collections.abc import Callable

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics import MeanMetric

import bigmodel
from bigmodel.training import optimizers, schedules


class MLP(nn.Module):
    """Two layers and dropout; maps [B, num_features] to [B]."""

    def __init__(self, num_features: int, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(num_features, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 1), nn.Flatten(0)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers(features)


class TabularRegression(LightningModule):
    """Squared error, summed over the rows.

    Args:
        net: creates the net from `num_features`, which the data define.
        optimizer: creates the optimizer.
        schedule: of the learning rate.
    """

    def __init__(
        self,
        net: Callable[[int], nn.Module] = MLP,
        optimizer: optimizers.OptimizerFactory = torch.optim.AdamW,
        schedule: schedules.Schedule | None = None,
    ) -> None:
        super().__init__()
        self.make_net, self.optimizer, self.schedule = net, optimizer, schedule
        self.net: nn.Module | None = None
        self.error = MeanMetric()

    def configure_model(self) -> None:
        if self.net is None:
            self.net = self.make_net(**bigmodel.sizes(self))

    def configure_optimizers(self):
        return optimizers.configure(self, self.optimizer, self.schedule)

    def training_step(self, batch):
        return {"loss": (self.net(batch.features) - batch.target).square().sum(), "count": len(batch.target)}

    def validation_step(self, batch):
        self.error.update((self.net(batch.features) - batch.target).square(), batch.weight)
        self.log("val/mse", self.error)

    def predict_step(self, batch):
        real = batch.weight > 0
        names = [f"row {i}" for i in batch.index[real].tolist()]
        return {"name": names, "predicted": self.net(batch.features)[real], "features": batch.features[real]}

    def prediction_metadata(self):
        return {"order": "that of the rows in the file"}
