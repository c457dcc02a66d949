"""User-based kNN: items of similar users (Resnick et al. 1994, "GroupLens"; Herlocker et al. 1999).

The similarity of two users is the cosine of their rows of the event matrix, or Pearson's correlation over the items that
both have. With r_j the ratings of an item by the k most similar users (of similarity above 0), its score is::

    mean:  sum_j w_j r_j / sum_j w_j              a predicted rating
    norm:  sum_j r_j / sqrt(sum_j r_j^2)          grows with the number of neighbours that have the item: for ranking

and 0 if no neighbour has the item. If events have no values, r_j is 1: `mean` is then 1 or 0, and `norm` the root of a
count. Both are also evaluated as predicted ratings, although `norm` is not on the scale of ratings.

U users, B users to score for, I items (numbered 1 to I), k neighbours.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from bigmodel.tasks.recommendation.closed_form.matrix import (
    ClosedForm,
    divide_at,
    event_matrix,
    history_matrix,
    load_matrix,
    ones_like,
    save_matrix,
    sparse_scores,
)
from bigmodel.tasks.recommendation.ranking import ScoreBlock, pack, unpack

_SIMILARITIES_AT_ONCE = 1 << 22


class UserKNN(ClosedForm):
    """Recommend items of similar users. `fit` only stores the events.

    Args:
        num_neighbors: k.
        similarity: `cosine` or `pearson` (needs ratings: it is 0 if all are equal).
        prediction: `norm` or `mean`, as above.
    """

    matrix: Any  # [U, I + 1], once fitted

    def __init__(
        self,
        num_neighbors: int = 100,
        similarity: Literal["cosine", "pearson"] = "cosine",
        prediction: Literal["norm", "mean"] = "norm",
    ) -> None:
        if num_neighbors < 1:
            raise ValueError(f"--model.method.num_neighbors {num_neighbors}: must be at least 1")
        if similarity not in ("cosine", "pearson"):
            raise ValueError(f"--model.method.similarity {similarity!r}: must be cosine or pearson")
        if prediction not in ("norm", "mean"):
            raise ValueError(f"--model.method.prediction {prediction!r}: must be norm or mean")
        self.num_neighbors, self.similarity, self.prediction = num_neighbors, similarity, prediction

    def fit(self, indptr: np.ndarray, indices: np.ndarray, values: np.ndarray | None, num_items: int) -> UserKNN:
        """Fit as in `ClosedForm.fit`."""
        if self.similarity == "pearson" and values is None:
            raise ValueError(
                "--model.method.similarity pearson needs ratings: set --model.values ratings, or --model.method.similarity"
                " cosine"
            )
        self.matrix = event_matrix(indptr, indices, values, num_items)
        return self

    def score_block(self, history: Tensor, values: Tensor | None = None, users: Tensor | None = None) -> ScoreBlock:
        """Score as in `ClosedForm.score_block`; a user is not a neighbour of itself.

        Raises:
            ValueError: for Pearson's correlation with histories that are not rated.
        """
        sums, scale = self._sums(history, values, users)
        scale.data[scale.data > 0] = 1 / scale.data[scale.data > 0]
        return sparse_scores(sums.multiply(scale), history.device)

    def rate(self, history: Tensor, ratings: Tensor, items: Tensor, users: Tensor | None = None) -> Tensor:
        """Rate as in `ClosedForm.rate`; NaN for an item that no neighbour has."""
        return divide_at(*self._sums(history, ratings, users), items)

    def _sums(self, history: Tensor, values: Tensor | None, users: Tensor | None) -> tuple[Any, Any]:
        """Return numerator and denominator of the module's equations, sparse [B, I + 1] each."""
        if self.similarity == "pearson" and values is None:
            raise ValueError(
                "--model.method.similarity pearson needs a history with ratings: set --user to a user of the data, or train"
                " with --model.method.similarity cosine"
            )
        given = history_matrix(history, values, self.matrix.shape[1] - 1)
        rows = np.full(len(history), -1) if users is None else users.cpu().numpy()
        size = max(1, _SIMILARITIES_AT_ONCE // self.matrix.shape[0])
        parts = [self._neighbors(given[i : i + size], rows[i : i + size]) for i in range(0, len(rows), size)]
        weights = sp.vstack(parts, "csr")  # [B, U]
        if self.prediction == "mean":
            return weights @ self.matrix, weights @ ones_like(self.matrix)
        weights = ones_like(weights)
        return weights @ self.matrix, (weights @ self.matrix.power(2)).sqrt()

    def state_dict(self) -> dict[str, Tensor]:
        return save_matrix("matrix", self.matrix)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.matrix = load_matrix("matrix", state)

    def _neighbors(self, given: Any, rows: np.ndarray) -> Any:
        """Return the sparse similarities [b, U] of the neighbours of users [b, I + 1]."""
        similarity = torch.from_numpy(self._pearson(given) if self.similarity == "pearson" else self._cosine(given))
        known = (rows >= 0).nonzero()[0]
        similarity[known, rows[known]] = 0
        keys = pack(similarity.float(), torch.arange(similarity.shape[1]))
        best, neighbors = unpack(keys.topk(min(self.num_neighbors, keys.shape[1])).values)
        row, slot = (best > 0).numpy().nonzero()
        cells = (row, neighbors.numpy()[row, slot])
        return sp.csr_matrix((best.numpy()[row, slot].astype(np.float64), cells), tuple(similarity.shape))

    def _cosine(self, given: Any) -> np.ndarray:
        own, others = (np.sqrt(matrix.power(2).sum(1).A1) for matrix in (given, self.matrix))
        scale = own[:, None] * others
        return _divide((given @ self.matrix.T).toarray(), scale, scale > 0)

    def _pearson(self, given: Any) -> np.ndarray:
        """Return Pearson's correlation over the items that both users have, of which there must be at least two."""
        both, others = ones_like(given), ones_like(self.matrix).T
        n = np.maximum((both @ others).toarray(), 1)
        mean_own, mean_other = (given @ others).toarray() / n, (both @ self.matrix.T).toarray() / n
        square_own = (given.power(2) @ others).toarray() / n
        square_other = (both @ self.matrix.power(2).T).toarray() / n
        product = (given @ self.matrix.T).toarray() / n
        variances = square_own - mean_own**2, square_other - mean_other**2
        # By rounding, the variance of equal ratings is not exactly 0.
        vary = (variances[0] > 1e-12 * square_own) & (variances[1] > 1e-12 * square_other)
        return _divide(product - mean_own * mean_other, np.sqrt(np.maximum(variances[0] * variances[1], 0)), vary)


def _divide(above: np.ndarray, below: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Return quotients where `where` is True, and 0 elsewhere."""
    return np.divide(above, below, out=np.zeros_like(above), where=where)
