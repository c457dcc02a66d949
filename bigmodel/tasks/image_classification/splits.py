"""Split of images into training, validation and test, the same on every machine.

Within each class the images are sorted by the hashes of their contents (BLAKE2b keyed by a constant, see scan.py),
which do not depend on names, places or dates. The first are the test split, the last the validation split, and the rest
is for training. So an image that is added, removed or renamed moves at most two others, none ever goes from test to
validation or back, and changing one share leaves the other split as it was.

N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise

import numpy as np

from bigmodel.data.split_shares import check_shares


@dataclass
class Split:
    """Shares of images of each class for validation and test.

    Data with splits keep them: then `val` is used only if there is no validation split, which is drawn from the
    training split; `test` is ignored.

    Args:
        val: share of each class for validation, at least 0 (no such split) and below 1.
        test: share of each class for test, likewise.
    """

    val: float = 0.1
    test: float = 0.0

    def __post_init__(self) -> None:
        check_shares(self.val, self.test)

    def deal(self, labels: np.ndarray, hashes: np.ndarray) -> dict[str, np.ndarray]:
        """Return numbers of the images in train, and in val and test if their shares are not 0; each ascending.

        Equal contents go to the same split, and count once, in the lowest of their classes. Counts per class are rounded to
        the nearest, but are at least 1 in a class that has more contents than there are splits.

        Args:
            labels: [N] class numbers.
            hashes: [N, 16] uint8, of the contents.
        """
        contents, content = np.unique(hashes.view("V16").ravel(), return_inverse=True)  # in the order of the hashes
        owner = np.full(len(contents), np.iinfo(np.int64).max)
        np.minimum.at(owner, content, labels)
        order = np.argsort(owner, kind="stable")  # by class, then by hash
        borders = np.flatnonzero(np.diff(owner[order], prepend=-2, append=-2)).tolist()
        split = np.full(len(contents), "train", dtype="<U5")
        for start, stop in pairwise(borders):
            split[order[start : start + self._count(self.test, stop - start)]] = "test"
            split[order[stop - self._count(self.val, stop - start) : stop]] = "val"
        shares = {"train": 1.0, "val": self.val, "test": self.test}
        return {name: np.flatnonzero(split[content] == name) for name, share in shares.items() if share > 0}

    def _count(self, share: float, contents: int) -> int:
        """Return the number of contents of a class for a split with this share."""
        num_splits = 1 + (self.val > 0) + (self.test > 0)
        return max(int(share * contents + 0.5), int(share > 0 and contents > num_splits))


def draw_shots(labels: np.ndarray, hashes: np.ndarray, classes: Sequence[str], shots: int, seed: int) -> np.ndarray:
    """Return numbers of `shots` training images of each class, ascending.

    They are the first in an order that depends on the seed, so that fewer shots are a subset of more. Equal contents
    count once.

    Args:
        labels: [N] class numbers.
        hashes: [N, 16] uint8, of the contents.
        classes: names, by class number.
        shots: images of each class.
        seed: determines which.

    Raises:
        ValueError: if a class has fewer.
    """
    if shots < 1:
        raise ValueError(f"--data.shots {shots}: at least 1 image of each class is needed")
    _, first = np.unique(hashes.view("V16").ravel(), return_index=True)
    key = seed.to_bytes(8, "little", signed=True)
    drawn = [blake2b(content.tobytes(), key=key, digest_size=16).digest() for content in hashes[first]]
    first = first[np.argsort(np.array(drawn, "V16"), kind="stable")]
    chosen = [first[labels[first] == number][:shots] for number in range(len(classes))]
    few = {name: len(members) for name, members in zip(classes, chosen, strict=True) if len(members) < shots}
    if few:
        shown = ", ".join(f"{name!r} has {count:,}" for name, count in list(few.items())[:5])
        raise ValueError(
            f"--data.shots {shots}: {len(few):,} of {len(classes):,} classes have fewer different training images:"
            f" {shown}; at most {min(few.values()):,} can be drawn of each"
        )
    return np.sort(np.concatenate(chosen))
