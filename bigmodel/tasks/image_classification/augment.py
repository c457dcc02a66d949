"""Augmentation of batches of images on the device that trains: what a transform is, and how a list of them is applied.

Everything random about an image is hashed from its key, see `bigmodel.data.stateless_rng`. So a row of the result depends
on its own image and key alone: not on the batch it is in, nor on its place there, nor on the process.

Transforms: `geometry` (crops, mirror images, affine maps), `color`, `random_erasing`, and `auto_augment` (RandAugment,
TrivialAugment).

B images, C channels, H and W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Streams of random numbers (see `bigmodel.data.stateless_rng`). Those below the first are for what is drawn outside of the
# list: eight for crops at decoding, then those of mixing.
CROP_STREAM, MIX_STREAM = 0, 8
_FIRST_STREAM, _STREAMS_EACH = 64, 64


class Transform(ABC):
    """One random change to each image of a batch."""

    flag = "--data.augment"  # where a person sets it, for errors

    @abstractmethod
    def __call__(self, images: Tensor, keys: Tensor, stream: int) -> Tensor:
        """Changed images; those given are left as they are.

        Args:
            images: [B, C, H, W] float32 in 0 to 1.
            keys: [B] int64, on the same device.
            stream: first of the 64 streams that are this transform's own.

        Returns:
            [B, C, H, W] float32 in 0 to 1.
        """


def augment(images: Tensor, keys: Tensor, transforms: Sequence[Transform]) -> Tensor:
    """Apply transforms one after the other.

    Args:
        images: [B, C, H, W], uint8, or floating point in 0 to 1.
        keys: [B] int64, on the same device.
        transforms: in this order; each draws from streams of its own, which follow from its place.

    Returns:
        [B, C, H, W] float32 in 0 to 1.
    """
    images = images.to(torch.float32).div_(255) if images.dtype == torch.uint8 else images.to(torch.float32)
    for place, transform in enumerate(transforms):
        images = transform(images, keys, _FIRST_STREAM + place * _STREAMS_EACH)
    return images


def change_rows_(images: Tensor, rows: Tensor, change: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """Change some rows in place.

    Args:
        images: [B, C, H, W].
        rows: [B] bool, which of them.
        change: from images [b, C, H, W], and as many rows of each argument, to images of the same shape, row by row.
        arguments: each [B, ...].
    """
    # On a CPU the cost is that of the pixels that are computed, so only the rows asked for are: RandAugment, where each
    # row is asked for by one operation of many, takes a tenth of the time. A GPU computes all rows: to know how many
    # are asked for would stall it until all that is queued is done, which costs more.
    if images.device.type == "cpu":
        numbers = rows.nonzero()[:, 0]
        if len(numbers):
            chosen = (argument.index_select(0, numbers) for argument in arguments)
            images.index_copy_(0, numbers, change(images.index_select(0, numbers), *chosen))
        return images
    return images.copy_(torch.where(rows[:, None, None, None], change(images, *arguments), images))


def require(condition: bool, transform: Transform, what: str) -> None:
    """Refuse an argument of a transform.

    Raises:
        ValueError: unless the condition holds; `what` says what was wrong and what is accepted.
    """
    if not condition:
        raise ValueError(f"{transform.flag}: {type(transform).__name__} {what}")
