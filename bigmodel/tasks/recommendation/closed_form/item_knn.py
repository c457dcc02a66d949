"""Item-based kNN: items similar to those in the history (Deshpande and Karypis 2004, "Item-based top-N recommendation
algorithms").

The similarity of two items is the cosine of their columns x_i of the event matrix, shrunk for short columns (Ferrari
Dacrema et al. 2019, arXiv 1907.06902). The score of an item is the sum of its similarities to the items of a history, of
which only the K largest of each item are used::

    w_ij = x_i . x_j / (|x_i| |x_j| + shrinkage),      score_j = sum_{i in history} w_ij  over the K largest of each i

or, as in RecBole, over the K largest of each j (`neighbors_of`).

A predicted rating is the weighted mean of the user's ratings (Sarwar et al. 2001, doi 10.1145/371920.372071)::

    r_j = sum_{i in history} w_ij r_i / sum_{i in history} w_ij

U users, I items (numbered 1 to I), K neighbours of an item.
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
    partition_by_budget,
    require_memory,
    save_matrix,
    sparse_scores,
)
from bigmodel.tasks.recommendation.ranking import ScoreBlock, pack, unpack

_SIMILARITIES_AT_ONCE = 1 << 22  # of a block of items with all items that share a user with them


class ItemKNN(ClosedForm):
    """Recommend neighbours of the history's items.

    Args:
        num_neighbors: K.
        shrinkage: in units of |x_i| |x_j|, at least 0.
        neighbors_of: K similarities are used of each item of the `history`, or of each `recommended` item (RecBole).

    Attributes:
        similarity: sparse [I + 1, I + 1] float32, once fitted; w_ij is in row i and column j; ties are broken by
            the lower number.
    """

    similarity: Any

    def __init__(
        self,
        num_neighbors: int = 100,
        shrinkage: float = 0.0,
        neighbors_of: Literal["history", "recommended"] = "history",
    ) -> None:
        if num_neighbors < 1:
            raise ValueError(f"--model.method.num_neighbors {num_neighbors}: must be at least 1")
        if not 0 <= shrinkage < float("inf"):
            raise ValueError(f"--model.method.shrinkage {shrinkage}: must be 0 or above")
        if neighbors_of not in ("history", "recommended"):
            raise ValueError(f"--model.method.neighbors_of {neighbors_of!r}: must be history or recommended")
        self.num_neighbors, self.shrinkage, self.neighbors_of = num_neighbors, shrinkage, neighbors_of

    def fit(self, indptr: np.ndarray, indices: np.ndarray, values: np.ndarray | None, num_items: int) -> ItemKNN:
        """Fit as in `ClosedForm.fit`. Memory: 24 bytes for each neighbour, and a block of similarities at a time."""
        by_user = event_matrix(indptr, indices, values, num_items)
        by_user.eliminate_zeros()
        by_item = by_user.T.tocsr()  # [I + 1, U]
        num_users = np.diff(by_item.indptr)
        # Upper bound of the number of items that share a user with each item.
        sharing = np.minimum(by_item.astype(bool) @ np.diff(by_user.indptr), num_items)
        require_memory(
            24.0 * np.minimum(sharing, self.num_neighbors).sum() + 64.0 * _SIMILARITIES_AT_ONCE,
            f"ItemKNN with {self.num_neighbors} neighbours of {num_items:,} items",
            "set a smaller --model.method.num_neighbors",
        )
        norms = np.sqrt(by_item.multiply(by_item).sum(1)).A1
        order = sharing.argsort(kind="stable")
        order = order[num_users[order] > 0]
        parts = [
            self._neighbors(order[start:stop], by_item, by_user, norms)
            for start, stop in partition_by_budget(sharing[order], _SIMILARITIES_AT_ONCE)
        ]
        rows, columns, similarities = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        if self.neighbors_of == "recommended":  # similarities are symmetric
            rows, columns = columns, rows
        self.similarity = sp.csr_matrix((similarities, (rows, columns)), (num_items + 1, num_items + 1))
        return self

    def _neighbors(self, items: np.ndarray, by_item: Any, by_user: Any, norms: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return rows, columns and values of the largest similarities of a block of items."""
        products = by_item[items] @ by_user  # [n, I + 1]
        lengths = np.diff(products.indptr)
        row = np.repeat(np.arange(len(items)), lengths)
        similarity = products.data / (norms[items[row]] * norms[products.indices] + self.shrinkage)
        keys = pack(torch.from_numpy(similarity).float(), torch.from_numpy(products.indices).long())
        nothing = int(pack(torch.zeros(1), torch.zeros(1, dtype=torch.int64)))  # sorts above no similarity but 0
        padded = torch.full((len(items), int(lengths.max())), nothing)
        place = torch.from_numpy(np.arange(len(row)) - products.indptr[row])
        other = products.indices != items[row]
        padded[torch.from_numpy(row), place] = torch.where(torch.from_numpy(other), keys, nothing)
        best, columns = unpack(padded.topk(min(self.num_neighbors, padded.shape[1])).values)
        n, slot = (best > 0).numpy().nonzero()
        return items[n], columns.numpy()[n, slot], best.numpy()[n, slot]

    def score_block(self, history: Tensor, values: Tensor | None = None, users: Tensor | None = None) -> ScoreBlock:
        """Score as in `ClosedForm.score_block`; an item of the history is weighted by its value."""
        given = history_matrix(history, values, self.similarity.shape[0] - 1)
        return sparse_scores(given @ self.similarity, history.device)

    def rate(self, history: Tensor, ratings: Tensor, items: Tensor, users: Tensor | None = None) -> Tensor:
        """Rate as in `ClosedForm.rate`; NaN for an item that is not a neighbour of any item in the history."""
        given = history_matrix(history, ratings, self.similarity.shape[0] - 1)
        return divide_at(given @ self.similarity, ones_like(given) @ self.similarity, items)

    def state_dict(self) -> dict[str, Tensor]:
        return save_matrix("similarity", self.similarity)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.similarity = load_matrix("similarity", state)
