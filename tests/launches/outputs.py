"""What a frozen net says of ten samples, kept by two processes: `python forked.py 2 outputs.py FOLDER`.

Run by test_output_cache.py, which computes the same alone.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn

from bigmodel.data.output_cache import FieldSpec, OutputCache
from bigmodel.data.sampling import sequential_loader, train_loader

FIELDS = {"logits": FieldSpec((7,), torch.float16), "largest": FieldSpec((), torch.int64)}


class Sample(NamedTuple):
    values: torch.Tensor
    index: torch.Tensor
    weight: torch.Tensor


class Noisy:
    """N vectors, with noise that is a function of the epoch."""

    def __init__(self, n: int = 10) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitems__(self, numbers, epoch=0):
        rows = [torch.randn(64, generator=torch.Generator().manual_seed(1000 * epoch + i)) for i in numbers]
        return Sample(torch.stack(rows), torch.tensor(numbers), torch.ones(len(numbers)))


class Data(LightningDataModule):
    def train_dataloader(self):
        return train_loader(Noisy(), batch_size=2, trainer=self.trainer)


def frozen():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 7))


def say(net, batch):
    logits = net(batch.values)
    return {"logits": logits, "largest": logits.argmax(1)}


class Student(LightningModule):
    """Has the store computed when its training begins, and sees to it that each batch finds its rows."""

    def __init__(self, outputs, views):
        super().__init__()
        self.outputs, self.views, self.net, self.teacher = outputs, views, nn.Linear(64, 7), [frozen()]

    def on_fit_start(self):
        def batches(view):
            return sequential_loader(
                self.trainer.datamodule.train_dataloader(), rows=3, trainer=self.trainer, epoch=view
            )

        self.outputs.compute(self.trainer, batches, lambda batch: say(self.teacher[0], batch))

    def training_step(self, batch):
        kept = self.outputs.read(batch.index, self.trainer.current_epoch % self.views)
        said = self.teacher[0](batch.values)
        epoch_is_a_view = self.trainer.current_epoch < self.views
        assert not epoch_is_a_view or torch.allclose(kept["logits"].float(), said, atol=1e-3)
        return self.net(batch.values).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, views: int = 2, devices: int = 1) -> OutputCache:
    outputs = OutputCache(folder, {"net": "frozen"}, 10, FIELDS, views)
    student = Student(outputs, views)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    strategy = "ddp" if devices > 1 else "auto"
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_epochs=3, use_distributed_sampler=False, **quiet
    )
    trainer.fit(student, datamodule=Data())
    return outputs


if __name__ == "__main__":
    torch.set_num_threads(1)
    fit(Path(sys.argv[1]), devices=2)
    dist.barrier()
    dist.destroy_process_group()  # else who ends first may bring the other down
