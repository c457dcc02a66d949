"""Split of images into training, validation and test by their contents; see `bigmodel.data.stratified_splits`.

Contents are ranked by their hashes (BLAKE2b keyed by a constant, see scan.py).

N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from bigmodel.data import stratified_splits
from bigmodel.data.split_shares import check_shares


@dataclass
class ImageSplit:
    """Shares of images of each class for validation and test.

    Splits of the data are used as they are: then `val` is used only if there is no validation split, which is drawn from
    the training split; `test` is ignored.

    Args:
        val: share of each class for validation, at least 0 (no such split) and below 1.
        test: share of each class for test, likewise.
    """

    val: float = 0.1
    test: float = 0.0

    def __post_init__(self) -> None:
        check_shares(self.val, self.test)

    def assign(self, labels: np.ndarray, hashes: np.ndarray) -> dict[str, np.ndarray]:
        """Return numbers of the images in train, and in val and test if their shares are not 0; each ascending.

        Equal contents go to the same split, and count once, in the lowest of their classes. Counts per class are rounded
        to the nearest, but are at least 1 in a class that has more contents than there are splits.

        Args:
            labels: [N] class numbers.
            hashes: [N, 16] uint8, of the contents.
        """
        shares = {"train": 1.0, "val": self.val, "test": self.test}
        names = [name for name, share in shares.items() if share > 0]
        groups = stratified_splits.group_by_stratum(hashes.view("V16").ravel(), labels)
        split = stratified_splits.assign_splits(groups, self.val, self.test, min_groups=len(names) + 1)
        return {name: np.flatnonzero(split == name) for name in names}


def draw_shots(labels: np.ndarray, hashes: np.ndarray, classes: Sequence[str], shots: int, seed: int) -> np.ndarray:
    """Return numbers of `shots` training images of each class, ascending; equal contents count once.

    Args:
        labels: [N] class numbers.
        hashes: [N, 16] uint8, of the contents.
        classes: names, by class number.
        shots: images of each class.
        seed: selects the images.

    Raises:
        ValueError: if a class has fewer.
    """
    _, first = np.unique(hashes.view("V16").ravel(), return_index=True)
    key = seed.to_bytes(8, "little", signed=True)
    drawn = [blake2b(content.tobytes(), key=key, digest_size=16).digest() for content in hashes[first]]
    first = first[np.argsort(np.array(drawn, "V16"), kind="stable")]
    return stratified_splits.draw_shots(first, labels[first], dict(enumerate(classes)), shots, "images")
