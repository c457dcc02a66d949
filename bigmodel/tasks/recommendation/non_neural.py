"""Non-neural recommenders (popularity, neighbours, linear autoencoder) as a task: fitted, evaluated and saved once.

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
from bigmodel.tasks.recommendation.closed_form import ClosedForm, Popularity, recency_weights
from bigmodel.tasks.recommendation.evaluation import Seen
from bigmodel.tasks.recommendation.module import history_batch
from bigmodel.tasks.recommendation.ranking import ScoreBlock
from bigmodel.tasks.recommendation.recommender import Recommender


class NonNeuralRecommendation(Recommender):
    """Fit a non-neural method on the first process, broadcast it, evaluate it, and recommend with it.

    The run has one step, in which the method is fitted. Experiments set `trainer.max_steps` to 1 and
    `trainer.num_sanity_val_steps` to 0.

    Args:
        method: one of bigmodel.tasks.recommendation.closed_form: Popularity (by default), UserKNN, ItemKNN, EASE.
        values: value of an event in training and in histories: 1 (`ones`), or its rating (`ratings`).
        recency_decay: factor of the value of an item of a history for each later item; 1: no decay. For lists only:
            predicted ratings ignore the order.
        topk: lengths k of the evaluated lists.
        num_eval_negatives, seen: as in SequentialRecommendation.

    Logs the metrics of SequentialRecommendation; with `ratings` and a method that predicts them (UserKNN, ItemKNN) also
    `val/rmse` and `val/mae` over all targets. If the method cannot rate an item, the mean of the user's history is used.
    """

    count_unit = "users"
    callback_types = ()  # no gradients
    example_type = "users"

    def __init__(
        self,
        method: ClosedForm | None = None,
        values: Literal["ones", "ratings"] = "ones",
        recency_decay: float = 1.0,
        topk: Sequence[int] = (5, 10, 20),
        num_eval_negatives: int | None = None,
        seen: Seen = "mask",
    ) -> None:
        super().__init__(topk, num_eval_negatives, seen=seen)
        self.method: ClosedForm = method if method is not None else Popularity()
        self.values: Literal["ones", "ratings"] = values
        self.recency_decay = recency_decay
        recency_weights(torch.zeros(1, 1, dtype=torch.int64), recency_decay)  # checks the decay
        self.fitted = False
        self.fitted_on = ""  # fingerprint of the events
        # Dummy parameter: Lightning needs an optimizer step in order to write a checkpoint.
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
        values = batch.history_ratings if self.values == "ratings" else None  # None for the history of `recommend`
        if self.recency_decay != 1:
            values = recency_weights(batch.history, self.recency_decay) * (1 if values is None else values)
        return self.method.score_block(batch.history, values, self._training_rows(batch))

    def predicted_ratings(self, batch: EvalBatch) -> Tensor | None:
        if self.values != "ratings" or batch.history_ratings is None:
            return None
        rated = self.method.rate(batch.history, batch.history_ratings, batch.targets, self._training_rows(batch))
        if rated is None:
            return None
        mean = batch.history_ratings.sum(1, keepdim=True) / (batch.history > 0).sum(1, keepdim=True)  # [B, 1]
        return torch.where(rated.isnan(), mean, rated)

    def _training_rows(self, batch: EvalBatch) -> Tensor | None:
        """Return the rows of a batch's users in the training events; None if the data are different."""
        is_same = self._data is None or self._data.prepared.fingerprint == self.fitted_on
        return batch.users if is_same else None

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
        """Return the best items for a history, as `SequentialRecommendation.recommend`; times are ignored."""
        numbers = self._item_catalog().numbers(history)
        batch = history_batch(numbers, None, len(numbers), self.device)
        return self.recommend_to(batch._replace(users=batch.users - 1), k)  # -1: a user without training events
