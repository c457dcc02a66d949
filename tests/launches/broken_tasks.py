"""The outsider's task with defects, for test_check_task.py: each class has some, and the test says which."""

import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from outsider import MLP, TableData, TabularRegression
from outsider.data import Rows, Table
from torch import nn
from torch.utils.data import DataLoader

from bigmodel.training import optimizers, schedules


class MeanLoss(TabularRegression):
    """Its loss is a mean, its metric counts padding rows, and only half of SupportsLogits is implemented."""

    def training_step(self, batch):
        return {"loss": super().training_step(batch)["loss"] / len(batch.target), "count": len(batch.target)}

    def validation_step(self, batch):
        self.error.update((self.net(batch.features) - batch.target).square())
        self.log("val/mse", self.error)

    def features(self, batch):
        return batch.features


class Contrastive(TabularRegression):
    """No defect: a loss of the whole batch, declared."""

    loss_is_per_sample = False

    def training_step(self, batch):
        output = self.net(batch.features).flatten()
        similarity = -(output[:, None] - batch.target.flatten()[None, :]).square()
        return nn.functional.cross_entropy(similarity, torch.arange(len(output)))


class EachForItself(TabularRegression):
    """Its net has fixed sizes and is created in __init__, and its metric is that of one process."""

    def __init__(
        self,
        net: Callable[[int], nn.Module] = MLP,
        optimizer: optimizers.OptimizerFactory = torch.optim.AdamW,
        schedule: schedules.Schedule | None = None,
    ) -> None:
        super().__init__(net, optimizer, schedule)
        self.net = MLP(num_features=2)

    def on_validation_epoch_start(self):
        self.total = self.count = 0.0

    def validation_step(self, batch):
        self.total += float(((self.net(batch.features) - batch.target).square() * batch.weight).sum())
        self.count += float(batch.weight.sum())

    def on_validation_epoch_end(self):
        self.log("val/mse", self.total / self.count)


class DrawsElsewhere(TabularRegression):
    """Its noise does not come from torch, and it reads its sizes from the data module itself."""

    def configure_model(self):
        if self.net is None:
            self.net = self.make_net(num_features=len(self.trainer.datamodule.train[0].features))

    def training_step(self, batch):
        step = super().training_step(batch)
        return {"loss": step["loss"] * (1 + random.random()), "count": step["count"]}


class NoCount(TabularRegression):
    """It returns only a mean."""

    def training_step(self, batch):
        return (self.net(batch.features) - batch.target).square().mean()


class Crashes(TabularRegression):
    """Its training step raises."""

    def training_step(self, batch):
        return {"loss": batch.features @ batch.target, "count": 1}


class Normed(nn.Module):
    """Net in which the rows of a batch are not independent: not a defect, but not comparable."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm1d(num_features), nn.Linear(num_features, 1), nn.Flatten(0))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers(features)


class Unsized(TableData):
    """It does not accept micro_batch_size."""

    def __init__(self, path: str, target: str, batch_size: int = 32) -> None:
        super().__init__(path, target, batch_size)


class Plain(TableData):
    """Its training loader is torch's own."""

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)


class Nameless(TableData):
    """Its size is a tensor instead of a plain int."""

    def setup(self, stage):
        super().setup(stage)
        if stage != "predict":
            self.sizes = {"num_features": torch.tensor(self.sizes["num_features"])}


class Pair(NamedTuple):
    features: torch.Tensor
    target: torch.Tensor


class Bare(TableData):
    """Its training batches have neither index nor weight, and its first validation samples are repeated."""

    def setup(self, stage):
        super().setup(stage)
        if stage != "predict":
            self.train = [Pair(*self.train[i][:2]) for i in range(len(self.train))]
            self.val = Repeated(self.val.values)


class Repeated(Table):
    def __getitem__(self, i: int) -> Rows:
        return super().__getitem__(i % 4)
