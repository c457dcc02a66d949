"""A LightningModule and a data module as tutorials write them: nothing of bigmodel, a plain DataLoader.

Run by test_callbacks.py.
"""

from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, StackDataset


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


def as_kind(kind, pairs):
    x, y = (torch.stack(each) for each in zip(*pairs, strict=True))
    return {
        "list": [x, y],
        "tuple": (x, y),
        "named": Pair(x, y),
        "dict": {"x": x, "y": y},
        "tensor": torch.cat([x, y], 1),
    }[kind]


class Data(L.LightningDataModule):
    def __init__(self, kind: str = "list"):
        super().__init__()
        self.kind = kind

    def train_dataloader(self):
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(32, 2, generator=draw)
        rows = StackDataset(x, x.sum(1, keepdim=True))
        return DataLoader(rows, batch_size=8, collate_fn=lambda pairs: as_kind(self.kind, pairs))


class Tutorial(L.LightningModule):
    """Regression; `count`: how the training step counts, `none` for a mean loss alone."""

    def __init__(self, count: str = "none"):
        super().__init__()
        self.count, self.layer = count, nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        values = (
            batch
            if isinstance(batch, Tensor)
            else torch.cat(list(batch.values() if isinstance(batch, dict) else batch), 1)
        )
        errors = (self.layer(values[:, :2]) - values[:, 2:]).square()
        self.log("train_loss", errors.mean())
        weight = {"none": None, "int": len(errors), "float": len(errors) / 1.0, "half": len(errors) / 2}[self.count]
        return errors.mean() if weight is None else {"loss": errors.sum() * weight / len(errors), "count": weight}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
