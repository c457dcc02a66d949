"""Hugging Face's Trainer with the same net, images, optimizer and precision, and all else at its defaults.

Its memory format is one of these: the net and its images are contiguous.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from bench.common import BF16, IMAGE_SIZES, Clock, ImageSize, arguments, digits
from bench.trainer import train
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
    """The images, normalized as they are read."""

    def __init__(self, size: ImageSize) -> None:
        images, self.labels = digits(size)
        self.images = images.contiguous()
        self.mean, self.std = (images / 255).mean(), (images / 255).std()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"pixel_values": (self.images[i] / 255 - self.mean) / self.std, "labels": self.labels[i]}


def main() -> None:
    options = arguments(__doc__)
    size, clock = IMAGE_SIZES[options.size], Clock(options.steps, options.warmup)
    train(
        Classifier(size), Digits(size), clock, size.batch_size, bf16=BF16, save_strategy="no",
        optim="sgd", optim_args="momentum=0.9,nesterov=True,fused=True", learning_rate=0.05, weight_decay=5e-4,
    )  # fmt: skip
    clock.report(size.batch_size)


if __name__ == "__main__":
    main()
