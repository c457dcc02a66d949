"""A plain PyTorch loop for images: the net, images, optimizer and clipping that `bigmodel fit` has, and nothing else.

All images lie in memory in channels_last order; a batch is a slice of a permutation. Prints the loss every 10 steps.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import BF16, IMAGE_SIZES, Clock, arguments, digits
from bigmodel.nn import ResNet


def batches(images: Tensor, labels: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Whole batches in a new order each epoch, without end."""
    while True:
        for rows in torch.randperm(len(images)).split(batch_size):
            if len(rows) == batch_size:
                yield images[rows], labels[rows]


def main() -> None:
    options = arguments(__doc__)
    size = IMAGE_SIZES[options.size]
    images, labels = digits(size)
    mean, std = (images.float() / 255).mean(), (images.float() / 255).std()

    torch.manual_seed(0)
    net = ResNet(10, size.channels, size.pixels, depth=size.depth, widths=size.widths)
    net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True)

    clock = Clock(options.steps, options.warmup)
    for step, (pixels, targets) in zip(range(options.steps), batches(images, labels, size.batch_size), strict=False):
        inputs = (pixels.float() / 255 - mean) / std
        with torch.autocast("cpu", torch.bfloat16, enabled=BF16):
            logits = net(inputs)
        loss = F.cross_entropy(logits.float(), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step} loss {loss.item():.4f}", flush=True)
        clock.tick()
    clock.report(size.batch_size)


if __name__ == "__main__":
    main()
