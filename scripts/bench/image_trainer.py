"""Hugging Face's Trainer with the same net, pictures, optimizer and precision, and all else at its defaults."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from bench.common import BENCH, IMAGE_SIZES, Clock, ImageSize, arguments, digits
from bigmodel.nn import ResNet


class Classifier(nn.Module):
    """The net with its loss, as Trainer wants it."""

    def __init__(self, size: ImageSize) -> None:
        super().__init__()
        self.net = ResNet(10, size.channels, size.pixels, depth=size.depth, widths=size.widths)
        self.net.to(memory_format=torch.channels_last)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(pixel_values.to(memory_format=torch.channels_last))
        return {"loss": F.cross_entropy(logits.float(), labels), "logits": logits}


class Timer(TrainerCallback):
    """The clock, at each optimizer step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.tick()


def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Rows of a data set to a batch by Trainer's names."""
    pixels, labels = zip(*rows, strict=True)
    return {"pixel_values": torch.stack(pixels), "labels": torch.stack(labels)}


def main() -> None:
    options = arguments(__doc__)
    size, clock = IMAGE_SIZES[options.size], Clock(options.steps, options.warmup)
    images, labels = digits(size)
    pixels = images.float() / 255
    data = TensorDataset((pixels - pixels.mean()) / pixels.std(), labels)
    with tempfile.TemporaryDirectory(dir=BENCH) as folder:
        settings = TrainingArguments(
            folder, max_steps=options.steps, per_device_train_batch_size=size.batch_size, use_cpu=True, bf16=True,
            optim="sgd", optim_args="momentum=0.9,nesterov=True,fused=True", learning_rate=0.05, weight_decay=5e-4,
            max_grad_norm=1.0, save_strategy="no",
        )  # fmt: skip
        timer = [Timer(clock)]
        Trainer(Classifier(size), settings, data_collator=collate, train_dataset=data, callbacks=timer).train()
    clock.report(size.batch_size)


if __name__ == "__main__":
    main()
