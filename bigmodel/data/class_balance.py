"""Handling of class imbalance: weights, or samples with equal frequency of each class.

N training samples, K classes, B samples of a batch.
"""

from __future__ import annotations

import numpy as np


def class_weights(counts: np.ndarray) -> np.ndarray:
    """Return weights [K] float32, inverse to the classes' sizes [K], with mean 1 over the samples."""
    weights: np.ndarray = (counts.sum() / (len(counts) * counts)).astype(np.float32)
    return weights


class ClassBalancedOversampling:
    """Oversampling with m samples per class in an epoch, the size of the largest class: sample n is of class n // m.

    Rows of a smaller class repeat cyclically, and the next epoch continues where the last one ended.

    Args:
        labels: [N] class numbers; each class has at least one.
    """

    def __init__(self, labels: np.ndarray) -> None:
        self._counts = np.bincount(labels)  # [K]
        self._by_class = np.argsort(labels, kind="stable")
        self._starts = np.cumsum(self._counts) - self._counts

    def __len__(self) -> int:
        return int(self._counts.max()) * len(self._counts)

    def rows(self, samples: np.ndarray, epoch: int) -> np.ndarray:
        """Return the row of each of these samples [B] in an epoch, [B]."""
        classes, turns = np.divmod(samples, self._counts.max())
        members = (turns + epoch * self._counts.max()) % self._counts[classes]
        rows: np.ndarray = self._by_class[self._starts[classes] + members]
        return rows
