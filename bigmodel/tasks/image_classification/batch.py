"""What passes between the parts of this task's data: images as they were found, and batches as the net reads them.

B images in a batch, C channels, H and W pixels, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:  # the processes that decode images do without torch
    from torch import Tensor

UNKNOWN = -1  # the class number of an image without a label


class ImageBatch(NamedTuple):
    """Images for the net.

    Attributes:
        images: [B, C, H, W], uint8 as read; float32 in 0 to 1 where they were augmented. Not normalized.
        targets: [B] int64 class numbers (-1: unknown), or [B, K] float32 distributions where images were mixed.
        index: [B] int64, which image of the split.
        weight: [B] float32, 0 for rows that only fill up a batch; in training the weight of the image's class.
        key: [B] int64, what all of an image's randomness is drawn from, see `bigmodel.data.stateless_rng`.
    """

    images: Tensor
    targets: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    weight: Tensor
    key: Tensor


class Store(Protocol):
    """Images as they lie on the disk, in an order that is stable, readable at random from any process, cheap to pickle."""

    def __len__(self) -> int:
        """Number of images."""

    def name(self, i: int) -> str:
        """What a person calls image i: its path, or file and row. Stands in errors and in predictions."""

    def read(self, i: int) -> bytes | np.ndarray:
        """The bytes of image i's file; or its pixels, [H, W] or [H, W, C] of uint8 or uint16.

        Raises:
            OSError: if the file cannot be read.
        """

    def stamp(self, i: int) -> list[str | int]:
        """What is another when the content of image i may be another, got without reading it: name, size in bytes, time
        of last change in ns. Empty if there is no such thing: the content itself must be read."""


@dataclass(frozen=True)
class Pictures:
    """Images and their class numbers.

    Attributes:
        store: where they are.
        labels: [N] int64; -1: not known.
    """

    store: Store
    labels: np.ndarray


@dataclass(frozen=True)
class Source:
    """What was found at a path.

    Attributes:
        splits: by name: `train`, and `val`, `test` if they are there; or `all` alone, not dealt out to splits yet.
        classes: their names, by class number; empty if no labels are known.
    """

    splits: dict[str, Pictures]
    classes: list[str]
