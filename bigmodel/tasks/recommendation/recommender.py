"""Base class of all recommenders: ranking for evaluation and prediction, and ids of the items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bigmodel.internals import attached_trainer
from bigmodel.tasks.recommendation.batches import EvalBatch
from bigmodel.tasks.recommendation.evaluation import Evaluation, Seen
from bigmodel.tasks.recommendation.item_catalog import ItemCatalog
from bigmodel.tasks.recommendation.ranking import ScoreBlock
from bigmodel.training import optimizers, schedules
from bigmodel.training.task import BaseTask


class Recommender(BaseTask):
    """Base class of a task that scores items for histories; a subclass defines `score_block`.

    Args:
        topk: lengths k of the evaluated lists.
        num_eval_negatives, seen: see `Evaluation`.
    """

    def __init__(
        self,
        topk: Sequence[int],
        num_eval_negatives: int | None = None,
        optimizer: optimizers.OptimizerFactory = torch.optim.AdamW,
        schedule: schedules.Schedule | None = None,
        seen: Seen = "mask",
    ) -> None:
        super().__init__(optimizer, schedule)
        self.evaluation = Evaluation(topk, num_eval_negatives, seen)
        self.item_catalog: ItemCatalog | None = None

    def score_block(self, batch: EvalBatch) -> ScoreBlock:
        """Return the scores of all items for a batch of histories, block by block (see `ranking`)."""
        raise NotImplementedError

    def predicted_ratings(self, batch: EvalBatch) -> torch.Tensor | None:
        """Return the predicted ratings [B, K] of the targets; None: the task predicts no ratings."""
        return None

    @property
    def _data(self) -> Any:
        """The data module; None if the task was loaded without data."""
        return getattr(attached_trainer(self), "datamodule", None)

    def _prepare_evaluation(self, num_items: int) -> torch.Tensor | None:
        """Prepare the evaluation; return the number of training events of each item [I + 1], or None without data."""
        counts = torch.from_numpy(self._data.item_counts()) if hasattr(self._data, "parts") else None
        self.evaluation.prepare(num_items, counts)
        if counts is not None:
            self._data.report_repeats(self.evaluation.seen)
        return counts

    def validation_step(self, batch: EvalBatch) -> None:
        self.evaluation.update(self.score_block(batch), batch, self.predicted_ratings(batch))

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.evaluation.compute("val"), sync_dist=True)

    def test_step(self, batch: EvalBatch) -> None:
        self.evaluation.update(self.score_block(batch), batch, self.predicted_ratings(batch))

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.evaluation.compute("test"), sync_dist=True)

    # SupportsPredict: the best items for each user, for `bigmodel predict`.

    def predict_step(self, batch: EvalBatch) -> dict[str, Any]:
        return self._item_catalog().prediction_table(
            self.score_block(batch), batch, max(self.evaluation.topk), self.evaluation.excluded(batch)
        )

    def prediction_metadata(self) -> dict[str, str]:
        rest = "items of the history may be among them" if self.evaluation.seen == "keep" else "none of the history"
        return {"lists": f"the items of each user, the best first; {rest}"}

    # The checkpoint contains the ids of the items, so that a loaded task can recommend without the data.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["item_catalog"] = self._item_catalog().state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        key = "item_catalog" if "item_catalog" in checkpoint else "catalogue"  # of earlier versions
        self.item_catalog = ItemCatalog.from_state_dict(checkpoint[key])

    @property
    def item_ids(self) -> list[int] | list[str] | None:
        """Ids of the training items, in the order of their numbers; None unless the task was loaded."""
        return None if self.item_catalog is None else self.item_catalog.item_ids

    def _item_catalog(self) -> ItemCatalog:
        return ItemCatalog.of_task(self.item_catalog, self._data)

    @torch.no_grad()
    def recommend_to(self, batch: EvalBatch, k: int = 10) -> list[dict[str, Any]]:
        """Return the best items for the one user of a batch from the data module's `user`.

        Each has `item`, `title` (or None) and `score`.

        Raises:
            ValueError: for a k above the number of items.
        """
        return self._item_catalog().recommend(self.score_block(batch), k, self.evaluation.excluded(batch))
