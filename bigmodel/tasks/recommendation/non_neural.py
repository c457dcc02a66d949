"""Closed-form recommenders as a task: fitted, evaluated and saved once.

B users, I items (numbered 1 to I; 0 is padding), U users of the training events, k length of a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bigmodel.data.cache import say
from bigmodel.run import sizes
from bigmodel.tasks.recommendation.batches import EvalBatch, UserBatch
from bigmodel.tasks.recommendation.closed_form import ClosedForm, Popularity, recency
from bigmodel.tasks.recommendation.module import one_history
from bigmodel.tasks.recommendation.ranking import ScoreBlock
from bigmodel.tasks.recommendation.recommender import Recommender


class FittedRecommendation(Recommender):
    """Fits a method in closed form on the first process, broadcasts it, evaluates it, and recommends with it.

    There is nothing to optimize: the run is one step long, in which the method is fitted. Its experiments set
    `trainer.max_steps` to 1 and skip validation before training.

    Args:
        method: one of bigmodel.tasks.recommendation.closed_form: Popularity (by default), UserKNN, ItemKNN, EASE.
        values: value of an event in training and in histories: 1 (`ones`), or its rating (`ratings`).
        decay: factor of the value of an item of a history for each item that was chosen after it; 1: no decay. For
            lists only: predicted ratings ignore the order.
        cutoffs: lengths k of the evaluated lists.
        sampled_negatives: as in SequenceRecommendation.

    Logs the metrics of SequenceRecommendation; with `ratings` and a method that predicts them (UserKNN, ItemKNN) also
    `val/rmse` and `val/mae` over all targets. Where the method cannot rate an item, the mean of the user's history is
    used.
    """

    count_unit = "users"
    examples = "users"

    def __init__(
        self,
        method: ClosedForm | None = None,
        values: Literal["ones", "ratings"] = "ones",
        decay: float = 1.0,
        cutoffs: Sequence[int] = (5, 10, 20),
        sampled_negatives: int | None = None,
    ) -> None:
        super().__init__(cutoffs, sampled_negatives)
        self.method: ClosedForm = method if method is not None else Popularity()
        self.values: Literal["ones", "ratings"] = values
        self.decay = decay
        recency(torch.zeros(1, 1, dtype=torch.int64), decay)  # checks the decay
        self.fitted = False
        self.fitted_on = ""  # fingerprint of the events
        # A dummy parameter: Lightning needs an optimizer step in order to write a checkpoint.
        self.nominal = nn.Parameter(torch.zeros(()))
        self.num_items = 0

    def configure_model(self) -> None:
        if self.evaluation.metrics is not None:
            return
        self.num_items = sizes(self)["num_items"]
        self._prepare_evaluation(self.num_items)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([self.nominal], lr=0.0)

    def training_step(self, batch: UserBatch) -> dict[str, Tensor]:
        if not self.fitted:
            self._fit()
        return {"loss": self.nominal * 0.0, "count": torch.tensor(len(batch.index), device=self.device)}

    def _fit(self) -> None:
        strategy, data = self.trainer.strategy, self._data
        if self.trainer.is_global_zero:
            matrix = data.train_matrix(self.values)
            values = None if self.values == "ones" else matrix.values
            self.method.fit(matrix.indptr, matrix.indices, values, self.num_items)
            say(f"fitted {type(self.method).__name__} on {len(matrix.indices):,} events")
        if self.trainer.world_size > 1:
            state = strategy.broadcast(self.method.state_dict() if self.trainer.is_global_zero else {})
            if not self.trainer.is_global_zero:
                self.method.load_state_dict(state)
        self.fitted, self.fitted_on = True, data.prepared.fingerprint

    def score_block(self, batch: EvalBatch) -> ScoreBlock:
        values = batch.history_ratings if self.values == "ratings" else None  # a history given by hand has no ratings
        if self.decay != 1:
            values = recency(batch.history, self.decay) * (1 if values is None else values)
        return self.method.score_block(batch.history, values, self._known(batch))

    def predicted_ratings(self, batch: EvalBatch) -> Tensor | None:
        if self.values != "ratings" or batch.history_ratings is None:
            return None
        rated = self.method.rate(batch.history, batch.history_ratings, batch.targets, self._known(batch))
        if rated is None:
            return None
        mean = batch.history_ratings.sum(1, keepdim=True) / (batch.history > 0).sum(1, keepdim=True)  # [B, 1]
        return torch.where(rated.isnan(), mean, rated)

    def _known(self, batch: EvalBatch) -> Tensor | None:
        """Return the rows of a batch's users in the training events; None if the data are different."""
        same = self._data is None or self._data.prepared.fingerprint == self.fitted_on
        return batch.users if same else None

    def validation_step(self, batch: EvalBatch) -> None:
        if self.fitted:
            super().validation_step(batch)

    def on_validation_epoch_end(self) -> None:
        if self.fitted:
            super().on_validation_epoch_end()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["method"] = self.method.state_dict() if self.fitted else None
        checkpoint["fitted_on"] = self.fitted_on

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if checkpoint["method"] is not None:
            self.method.load_state_dict(checkpoint["method"])
            self.fitted, self.fitted_on = True, checkpoint["fitted_on"]

    def recommend(
        self, history: Sequence[int | str], k: int = 10, times: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """Return the best items for a user with this history; see `SequenceRecommendation.recommend`. Times are not
        used.
        """
        numbers = self._catalogue().numbers(history)
        batch = one_history(numbers, None, len(numbers), self.device)
        return self.recommend_to(batch._replace(users=batch.users - 1), k)  # -1: a user without training events
