"""Augmentation of batches of images on the training device: the base class of transforms, and the function that applies
them.

All random draws of an image are hashed from its key, see `bigmodel.data.stateless_rng`. So a row of the result depends
on its own image and key alone: not on the batch, its position in the batch, or the process.

Transforms: `geometry` (crops, mirror images, affine maps), `color`, `random_erasing`, and `auto_augment` (RandAugment,
TrivialAugment).

B images, C channels, H and W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Streams of random numbers (see `bigmodel.data.stateless_rng`). Those below the first are used outside of the list:
# eight for crops at decoding, then those of mixing.
CROP_STREAM, MIX_STREAM = 0, 8
_FIRST_STREAM, _STREAMS_EACH = 64, 64


class Transform(ABC):
    """One random change to each image of a batch."""

    flag = "--data.augment"  # the flag that sets it, for errors

    @abstractmethod
    def __call__(self, images: Tensor, keys: Tensor, stream: int) -> Tensor:
        """Return changed images; the input is not modified.

        Args:
            images: [B, C, H, W] float32 in 0 to 1.
            keys: [B] int64, on the same device.
            stream: first of the 64 streams reserved for this transform.

        Returns:
            [B, C, H, W] float32 in 0 to 1.
        """


def augment(images: Tensor, keys: Tensor, transforms: Sequence[Transform]) -> Tensor:
    """Apply transforms one after the other.

    Args:
        images: [B, C, H, W], uint8, or floating point in 0 to 1.
        keys: [B] int64, on the same device.
        transforms: in this order; each draws from its own streams, which depend on its position.

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
        rows: [B] bool, the rows to change.
        change: maps images [b, C, H, W], and as many rows of each argument, to images of the same shape, row by row.
        arguments: each [B, ...].
    """
    # A CPU computes only the selected rows, because its cost is proportional to the pixels: RandAugment, where each row
    # is selected by one operation of many, takes a tenth of the time. A GPU computes all rows: counting the selected
    # rows would be a synchronisation, which costs more.
    if images.device.type == "cpu":
        numbers = rows.nonzero()[:, 0]
        if len(numbers):
            chosen = (argument.index_select(0, numbers) for argument in arguments)
            images.index_copy_(0, numbers, change(images.index_select(0, numbers), *chosen))
        return images
    return images.copy_(torch.where(rows[:, None, None, None], change(images, *arguments), images))


def require(condition: bool, transform: Transform, what: str) -> None:
    """Raise an error unless an argument of a transform is valid.

    Raises:
        ValueError: unless the condition holds; `what` is the received and the accepted value.
    """
    if not condition:
        raise ValueError(f"{transform.flag}: {type(transform).__name__} {what}")
