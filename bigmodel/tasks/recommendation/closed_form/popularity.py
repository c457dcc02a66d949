"""The items with the most users, the same for every user."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bigmodel.tasks.recommendation.closed_form.matrix import ClosedForm, event_matrix
from bigmodel.tasks.recommendation.ranking import ScoreBlock


class Popularity(ClosedForm):
    """Scores an item by the number of users that have it.

    Attributes:
        counts: [I + 1] float32, once fitted.
    """

    counts: Tensor

    def fit(self, indptr: np.ndarray, indices: np.ndarray, values: np.ndarray | None, num_items: int) -> Popularity:
        """Fit as in `ClosedForm.fit`; values have no effect."""
        matrix = event_matrix(indptr, indices, None, num_items)
        self.counts = torch.from_numpy(np.bincount(matrix.indices, minlength=num_items + 1)).float()
        return self

    def score_block(self, history: Tensor, values: Tensor | None = None, users: Tensor | None = None) -> ScoreBlock:
        """Score as in `ClosedForm.score_block`; the history has no effect."""
        counts = self.counts.to(history.device)
        return lambda first, last: counts[first:last].expand(len(history), -1)

    def state_dict(self) -> dict[str, Tensor]:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.counts = state["counts"]
