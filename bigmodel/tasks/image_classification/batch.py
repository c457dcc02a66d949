"""Types of this task's data: images as found at the source, and batches as the net reads them.

B images in a batch, C channels, H and W pixels, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:  # the processes that decode images do not import torch
    from torch import Tensor

UNKNOWN = -1  # the class number of an image without a label


class ImageBatch(NamedTuple):
    """Images for the net.

    Attributes:
        images: [B, C, H, W], uint8 as read; float32 in 0 to 1 where they were augmented. Not normalized.
        targets: [B] int64 class numbers (-1: unknown), or [B, K] float32 distributions where images were mixed.
        index: [B] int64, number of the image in its split.
        weight: [B] float32, 0 for padding rows; in training the weight of the image's class.
        key: [B] int64, key of all random draws of an image, see `bigmodel.data.stateless_rng`.
    """

    images: Tensor
    targets: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    weight: Tensor
    key: Tensor


class ImageStore(Protocol):
    """Images in a stable order, with random access from any process; cheap to pickle."""

    def __len__(self) -> int:
        """Number of images."""

    def name(self, i: int) -> str:
        """Return the name of image i: its path, or file and row. Used in errors and predictions."""

    def read(self, i: int) -> bytes | np.ndarray:
        """Return the bytes of image i's file; or its pixels, [H, W] or [H, W, C] of uint8 or uint16.

        Raises:
            OSError: if the file cannot be read.
        """

    def stamp(self, i: int) -> list[str | int]:
        """Return values that change with the content of image i, without reading it: name, size in bytes, time of last
        change in ns. Empty if there are none: then the content itself must be read.
        """


@dataclass(frozen=True)
class LabelledImages:
    """Images and their class numbers.

    Attributes:
        store: of the images.
        labels: [N] int64; -1: unknown.
    """

    store: ImageStore
    labels: np.ndarray


@dataclass(frozen=True)
class ImageSource:
    """Images found at a path.

    Attributes:
        splits: by name: `train`, and `val`, `test` if present; or `all` alone, not yet split.
        classes: names, by class number; empty without labels.
    """

    splits: dict[str, LabelledImages]
    classes: list[str]
