"""Hugging Face's Trainer with the same net, pictures, optimizer and precision, and all else at its defaults.

Its memory format is one of these: the net and its pictures are contiguous.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from bench.common import BENCH, IMAGE_SIZES, Clock, ImageSize, arguments, digits
from bigmodel.nn import ResNet


class Classifier(nn.Module):
    """The net with its loss, as Trainer wants it."""

    def __init__(self, size: ImageSize) -> None:
        super().__init__()
        self.net = ResNet(10, size.channels, size.pixels, depth=size.depth, widths=size.widths)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(pixel_values)
        return {"loss": F.cross_entropy(logits.float(), labels), "logits": logits}


class Digits(Dataset):
    """The pictures, normalized as they are read."""

    def __init__(self, size: ImageSize) -> None:
        images, self.labels = digits(size)
        self.images = images.contiguous()
        self.mean, self.std = (images / 255).mean(), (images / 255).std()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"pixel_values": (self.images[i] / 255 - self.mean) / self.std, "labels": self.labels[i]}


class Timer(TrainerCallback):
    """The clock, at each optimizer step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.tick()


def main() -> None:
    options = arguments(__doc__)
    size, clock = IMAGE_SIZES[options.size], Clock(options.steps, options.warmup)
    with tempfile.TemporaryDirectory(dir=BENCH) as folder:
        settings = TrainingArguments(
            folder, max_steps=options.steps, per_device_train_batch_size=size.batch_size, use_cpu=True, bf16=True,
            optim="sgd", optim_args="momentum=0.9,nesterov=True,fused=True", learning_rate=0.05, weight_decay=5e-4,
            max_grad_norm=1.0, save_strategy="no",
        )  # fmt: skip
        Trainer(Classifier(size), settings, train_dataset=Digits(size), callbacks=[Timer(clock)]).train()
    clock.report(size.batch_size)


if __name__ == "__main__":
    main()
