"""EASE, the linear autoencoder without self-similarity (Steck 2019, arXiv 1905.03375).

With X [U, I] the event matrix (1 where a user has an item) and lambda the weight of the squared penalty::

    P = (X'X + lambda 1)^-1,      B_ij = -P_ij / P_jj off the diagonal, 0 on it,      scores x B

If there are fewer users than items, P follows from a matrix of users by users instead (Woodbury), and B is not computed::

    P = (1 - X' C X) / lambda,    C = (X X' + lambda 1)^-1

U users, I items (numbered 1 to I).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

from bigmodel.tasks.recommendation.closed_form.matrix import (
    ClosedForm,
    event_matrix,
    history_matrix,
    load_matrix,
    require_memory,
    save_matrix,
)
from bigmodel.tasks.recommendation.ranking import ScoreBlock

_NUMBERS_AT_ONCE = 1 << 22


class EASE(ClosedForm):
    """Regression of each item on all other items, solved exactly by a Cholesky factorization in place.

    Args:
        l2: lambda, above 0; larger for more users (the paper has 200 to 1,000 for hundreds of thousands).
        dtype: of the inverted matrix.
    """

    def __init__(self, l2: float = 250.0, dtype: Literal["float32", "float64"] = "float64") -> None:
        if not 0 < l2 < float("inf"):
            raise ValueError(f"--model.method.l2 {l2}: must be above 0")
        if dtype not in ("float32", "float64"):
            raise ValueError(f"--model.method.dtype {dtype!r}: must be float32 or float64")
        self.l2, self.dtype = l2, dtype
        self.num_items = 0
        self.weights: Any = None  # B [I + 1, I + 1], unless there are fewer users than items
        self.by_item: Any = None  # else X' [I + 1, U],
        self.inverse: Any = None  # C [U, U],
        self.kept: Any = None  # and lambda P_jj [I + 1]

    def fit(self, indptr: np.ndarray, indices: np.ndarray, values: np.ndarray | None, num_items: int) -> EASE:
        """Fit as in `ClosedForm.fit`; values have no effect. Memory: one square matrix of the smaller of U and I."""
        matrix = event_matrix(indptr, indices, None, num_items)
        self.num_items = num_items
        by_users = matrix.shape[0] < num_items
        side, what = (matrix.shape[0], "users") if by_users else (num_items + 1, "items")
        require_memory(
            side**2 * np.dtype(self.dtype).itemsize + 24.0 * _NUMBERS_AT_ONCE,
            f"EASE in {self.dtype} over {side:,} {what}",
            ("--model.method.dtype float32 needs half, " if self.dtype == "float64" else "") + "ItemKNN much less",
        )
        matrix = matrix.astype(self.dtype)
        by_item = matrix.T.tocsr()  # [I + 1, U]
        if by_users:
            self.inverse, self.by_item = _inverse_of_gram(matrix, by_item, self.l2), by_item
            self.kept = np.ones(num_items + 1)
            size = max(1, _NUMBERS_AT_ONCE // side)
            for first in range(0, num_items + 1, size):
                x = by_item[first : first + size]
                self.kept[first : first + size] -= x.multiply(x @ self.inverse).sum(1).A1
        else:
            self.by_item = None
            self.weights = _inverse_of_gram(by_item, matrix, self.l2)
            self.weights /= -self.weights.diagonal()  # each column by its own
            np.fill_diagonal(self.weights, 0)
        return self

    def score_block(self, history: Tensor, values: Tensor | None = None, users: Tensor | None = None) -> ScoreBlock:
        """Score as in `ClosedForm.score_block`; an item of the history is weighted by its value."""
        given = history_matrix(history, values, self.num_items).astype(self.dtype)
        if self.by_item is None:
            scores = given @ self.weights  # [B, I + 1]: less than the weights, as long as B is less than I
            return lambda first, last: _tensor(scores[:, first:last], history.device)
        projected = ((given @ self.by_item) @ self.inverse).T  # [U, B]
        by_column = given.tocsc()

        def score_block(first: int, last: int) -> Tensor:
            x = by_column[:, first:last].toarray()
            # x B_j = x_j - x P_j / P_jj, as the diagonal of B is 0.
            return _tensor(x - (x - (self.by_item[first:last] @ projected).T) / self.kept[first:last], history.device)

        return score_block

    def state_dict(self) -> dict[str, Tensor]:
        if self.by_item is None:
            return {"weights": torch.from_numpy(self.weights)}
        parts = {"inverse": torch.from_numpy(self.inverse), "kept": torch.from_numpy(self.kept)}
        return parts | save_matrix("by_item", self.by_item)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if "weights" in state:
            self.by_item, self.weights = None, state["weights"].numpy()
            self.num_items = len(self.weights) - 1
        else:
            self.by_item = load_matrix("by_item", state)
            self.inverse, self.kept = state["inverse"].numpy(), state["kept"].numpy()
            self.num_items = len(self.kept) - 1


def _tensor(scores: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(scores).to(device, torch.float32)


def _inverse_of_gram(matrix: Any, transposed: Any, l2: float) -> np.ndarray:
    """Return (A A' + l2 1)^-1 [n, n] of a sparse matrix A [n, m], without a second matrix of that size."""
    side, dtype = matrix.shape[0], matrix.dtype
    gram = np.empty((side, side), dtype, order="F")
    size = max(1, _NUMBERS_AT_ONCE // side)
    for first in range(0, side, size):
        gram[:, first : first + size] = (matrix[first : first + size] @ transposed).toarray().T
    gram[np.arange(side), np.arange(side)] += l2
    factorize, invert = (lapack.dpotrf, lapack.dpotri) if dtype == "float64" else (lapack.spotrf, lapack.spotri)
    factor, failed = factorize(gram, lower=True, overwrite_a=True, clean=False)
    if failed:
        raise ValueError(
            f"X'X + l2 is not positive definite in {dtype}: set --model.method.l2 above {l2}, or --model.method.dtype"
            " float64"
        )
    inverse, _ = invert(factor, lower=True, overwrite_c=True)
    for first in range(0, side, size):  # the upper triangle from the lower one
        last = min(first + size, side)
        inverse[first:last, last:] = inverse[last:, first:last].T
        square = np.tril(inverse[first:last, first:last])
        inverse[first:last, first:last] = square + np.tril(square, -1).T
    return inverse.T  # the same, in rows
