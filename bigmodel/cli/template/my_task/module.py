"""Classification of source code by its trigrams. B batch, T bytes, K classes, D width."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric

import bigmodel
from bigmodel.training import optimizers, schedules
from bigmodel.training.task import BaseTask


class NGrams(nn.Module):
    """Mean of the embeddings of all trigrams, hashed into buckets; then a linear layer. [B, T] uint8 -> [B, K]."""

    def __init__(self, num_classes: int, width: int = 32, num_buckets: int = 8192) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(num_buckets, width), nn.Linear(width, num_classes)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        first, second, third = (text.long()[:, i : text.shape[1] - 2 + i] for i in range(3))  # [B, T - 2] each
        buckets = (first * 7919 + second * 104729 + third) % self.embedding.num_embeddings
        return self.head(self.embedding(buckets).mean(1))  # [B, T - 2, D] -> [B, D] -> [B, K]


class MyTask(BaseTask):  # a LightningModule with optimizer and schedule
    """Classifies chunks; logs `val/loss` (nats per chunk) and `val/accuracy`."""

    # Net, optimizer and their arguments come from the YAML file and flags; sizes of the data are added below.
    def __init__(
        self,
        net: Callable[[int], nn.Module] = NGrams,
        optimizer: optimizers.OptimizerFactory = torch.optim.AdamW,
        schedule: schedules.Schedule | None = None,
    ) -> None:
        super().__init__(optimizer, schedule)
        self.make_net = net
        self.loss, self.accuracy = MeanMetric(), MeanMetric()

    def configure_model(self) -> None:
        if self.net is None:
            self.net = self.make_net(**bigmodel.sizes(self))  # {"num_classes": K}, from the data or the checkpoint

    def training_step(self, batch):  # bigmodel divides by the count over all micro-batches and processes
        return {"loss": cross_entropy(self.net(batch.text), batch.target, reduction="sum"), "count": len(batch.target)}

    def validation_step(self, batch):  # torchmetrics adds up over processes; weight 0 excludes padding rows
        logits = self.net(batch.text)
        self.loss.update(cross_entropy(logits, batch.target, reduction="none"), batch.weight)
        self.accuracy.update((logits.argmax(1) == batch.target).float(), batch.weight)
        self.log_dict({"val/loss": self.loss, "val/accuracy": self.accuracy})
