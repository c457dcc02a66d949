"""Events and histories as sparse matrices, and checks of the required memory.

U users, B users to score for, H items of the longest history, I items (numbered 1 to I; column 0 is padding).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from bigmodel.tasks.recommendation.ranking import ScoreBlock


class ClosedForm(ABC):
    """A recommender without training steps."""

    @abstractmethod
    def fit(self, indptr: np.ndarray, indices: np.ndarray, values: np.ndarray | None, num_items: int) -> ClosedForm:
        """Fit the method to training events.

        Args:
            indptr: [U + 1], where each user's events begin.
            indices: [N] items of the events, in chronological order for each user.
            values: [N], values of the events, such as ratings; None: 1. Of repeated events of a user with an item, the
                last is used.
            num_items: I.

        Raises:
            ValueError: for arrays of inconsistent sizes, or if the memory is too small.
        """

    @abstractmethod
    def score_block(self, history: Tensor, values: Tensor | None = None, users: Tensor | None = None) -> ScoreBlock:
        """Return the scores of all items for B users (see `ranking.ScoreBlock`), on the history's device.

        Args:
            history: items [B, H] int64, padded with 0.
            values: [B, H], values of the items; None: 1.
            users: [B], row of each user in the training events, -1 for a new user; None: all are new.
        """

    def rate(self, history: Tensor, ratings: Tensor, items: Tensor, users: Tensor | None = None) -> Tensor | None:
        """Return predicted ratings of B users, on the history's device; None: the method predicts no ratings.

        Args:
            history: items [B, H] int64, padded with 0.
            ratings: [B, H], of the history.
            items: [B, K] int64, the items to rate.
            users: as for `score_block`.

        Returns:
            [B, K] float32, NaN where no prediction is possible.
        """
        return None

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Return the fitted state, for a checkpoint."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load a fitted state, into an object with the same options."""


def recency_weights(history: Tensor, decay: float) -> Tensor:
    """Return values [B, H] float32 of chronological histories [B, H]: decay^a for an item with a later ones.

    The methods ignore the order; with these values recent items have more weight, as in a sequential model.

    Raises:
        ValueError: for a decay that is not in (0, 1].
    """
    if not 0 < decay <= 1:
        raise ValueError(f"--model.recency_decay {decay}: must be above 0 and at most 1 (1: no decay)")
    is_item = history > 0
    age = is_item.sum(1, keepdim=True) - is_item.cumsum(1)
    return torch.where(is_item, decay ** age.float(), 0)


def event_matrix(indptr: np.ndarray, indices: np.ndarray, values: np.ndarray | None, num_items: int) -> Any:
    """Return events as a sparse matrix [U, I + 1] in rows, float64, sorted, each item at most once in a row."""
    indptr, indices = np.asarray(indptr, np.int64), np.asarray(indices)
    if len(indptr) < 2 or indptr[0] != 0 or indptr[-1] != len(indices) or (np.diff(indptr) < 0).any():
        raise ValueError(f"indptr must ascend from 0 to the number of events, {len(indices)}")
    if values is not None and (len(values) != len(indices) or not np.isfinite(values).all()):
        raise ValueError(f"values [{len(values)}] must be finite, one for each of the {len(indices)} events")
    if len(indices) == 0:
        raise ValueError("there are no training events")
    if not 1 <= indices.min() <= indices.max() <= num_items:
        raise ValueError(f"events have items {indices.min()} to {indices.max()}, but must be in 1 to {num_items}")
    users = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    return _matrix(users, indices, values, (len(indptr) - 1, num_items + 1))


def history_matrix(history: Tensor, values: Tensor | None, num_items: int) -> Any:
    """Return histories as a matrix [B, I + 1] like `event_matrix`."""
    items = history.cpu().numpy()
    if items.size and not 0 <= items.min() <= items.max() <= num_items:
        raise ValueError(
            f"histories have items {items.min()} to {items.max()}, but must be in 1 to {num_items}, or 0 (padding)"
        )
    rows, columns = items.nonzero()
    data = None if values is None else values.cpu().numpy()[rows, columns]
    return _matrix(rows, items[rows, columns], data, (len(items), num_items + 1))


def _matrix(rows: np.ndarray, columns: np.ndarray, values: np.ndarray | None, shape: tuple[int, int]) -> Any:
    cells = rows.astype(np.int64) * shape[1] + columns
    # The last of equal entries is the first in reverse order.
    cells, last = np.unique(cells[::-1], return_index=True)
    data = np.ones(len(cells)) if values is None else np.asarray(values, np.float64)[::-1][last]
    return sp.csr_matrix((data, (cells // shape[1], cells % shape[1])), shape)


def sparse_scores(scores: Any, device: torch.device) -> ScoreBlock:
    """Return block-wise scores from a sparse matrix [B, I + 1]."""
    by_column = scores.tocsc()

    def score_block(first: int, last: int) -> Tensor:
        return torch.from_numpy(by_column[:, first:last].toarray(order="C")).to(device, torch.float32)

    return score_block


def divide_at(above: Any, below: Any, items: Tensor) -> Tensor:
    """Return quotients [B, K] float32 of two sparse matrices [B, I + 1] at items [B, K]; NaN where the denominator is
    0.
    """
    columns = items.cpu().numpy()
    rows = np.arange(len(columns))[:, None].repeat(columns.shape[1], 1)
    picked = (np.asarray(matrix[rows.ravel(), columns.ravel()]).reshape(columns.shape) for matrix in (above, below))
    values, weights = (torch.from_numpy(numbers) for numbers in picked)
    return torch.where(weights > 0, values / weights, torch.nan).to(items.device, torch.float32)


def ones_like(matrix: Any) -> Any:
    """Return a matrix with 1 where an entry is stored."""
    return sp.csr_matrix((np.ones_like(matrix.data), matrix.indices, matrix.indptr), matrix.shape)


def save_matrix(name: str, matrix: Any) -> dict[str, Tensor]:
    """Return a sparse matrix in rows as tensors, for a state."""
    parts = {"data": matrix.data, "indices": matrix.indices, "indptr": matrix.indptr, "shape": np.array(matrix.shape)}
    return {f"{name}.{part}": torch.from_numpy(array) for part, array in parts.items()}


def load_matrix(name: str, state: dict[str, Tensor]) -> Any:
    """Return the matrix that `save_matrix` saved."""
    data, indices, indptr, shape = (state[f"{name}.{part}"].numpy() for part in ("data", "indices", "indptr", "shape"))
    return sp.csr_matrix((data, indices, indptr), tuple(shape.tolist()))


def partition_by_budget(sizes: np.ndarray, budget: int) -> list[tuple[int, int]]:
    """Partition an ascending array of sizes into ranges whose length times largest size is at most the budget.

    A size above the budget is a range of its own.
    """
    parts, start = [], 0
    while start < len(sizes):
        length = max(1, budget // max(1, int(sizes[start])))
        ahead = sizes[start : start + length]
        fits = np.arange(1, len(ahead) + 1) * ahead <= budget
        stop = start + max(1, int(fits.sum()))
        parts.append((start, stop))
        start = stop
    return parts


def require_memory(needed: float, purpose: str, instead: str) -> None:
    """Raise a ValueError, before allocation, if fewer than `needed` bytes are available."""
    available = available_memory()
    if needed > available:
        raise ValueError(
            f"{purpose} needs {needed / 1e9:,.1f} GB of main memory, but {available / 1e9:,.1f} GB are available: {instead}"
        )


def available_memory() -> float:
    """Return the available bytes of main memory, of the machine or of the process's control group."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: the total memory
        available = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())  # "max" if there is none
        available = min(available, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return available
