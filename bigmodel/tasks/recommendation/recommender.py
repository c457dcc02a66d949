"""Base class of all recommenders: ranking for evaluation and prediction, and ids of the items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule

from bigmodel.internals import attached_trainer
from bigmodel.tasks.recommendation.batches import EvalBatch
from bigmodel.tasks.recommendation.evaluation import Evaluation
from bigmodel.tasks.recommendation.item_catalog import ItemCatalog
from bigmodel.tasks.recommendation.ranking import ScoreBlock


class Recommender(LightningModule):
    """A task that scores items for histories; a subclass defines `score_block`.

    Args:
        cutoffs: lengths k of the evaluated lists.
        sampled_negatives: see `Evaluation`.
    """

    def __init__(self, cutoffs: Sequence[int], sampled_negatives: int | None = None) -> None:
        super().__init__()
        self.evaluation = Evaluation(cutoffs, sampled_negatives)
        self.catalogue: ItemCatalog | None = None

    def score_block(self, batch: EvalBatch) -> ScoreBlock:
        """Return the scores of all items for a batch of histories, block by block (see `ranking`)."""
        raise NotImplementedError

    def predicted_ratings(self, batch: EvalBatch) -> torch.Tensor | None:
        """Return the predicted ratings [B, K] of the targets; None: the task predicts none."""
        return None

    @property
    def _data(self) -> Any:
        """The data module; None if the task was loaded without one."""
        return getattr(attached_trainer(self), "datamodule", None)

    def _prepare_evaluation(self, num_items: int) -> torch.Tensor | None:
        """Prepare the evaluation; return the training events of each item [I + 1], where the data are split."""
        counts = torch.from_numpy(self._data.item_counts()) if hasattr(self._data, "parts") else None
        self.evaluation.prepare(num_items, counts)
        return counts

    def validation_step(self, batch: EvalBatch) -> None:
        self.evaluation.update(self.score_block(batch), batch, self.predicted_ratings(batch))

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.evaluation.compute("val"), sync_dist=True)

    def test_step(self, batch: EvalBatch) -> None:
        self.evaluation.update(self.score_block(batch), batch, self.predicted_ratings(batch))

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.evaluation.compute("test"), sync_dist=True)

    # `bigmodel predict`: the best items of each user.

    def predict_step(self, batch: EvalBatch) -> dict[str, Any]:
        return self._catalogue().table(self.score_block(batch), batch, max(self.evaluation.cutoffs))

    def prediction_metadata(self) -> dict[str, str]:
        return {"lists": "the items of each user, the best first; none that the user has had"}

    # The checkpoint holds the ids of the items, so that a loaded task recommends without the data.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["catalogue"] = self._catalogue().state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.catalogue = ItemCatalog.from_state_dict(checkpoint["catalogue"])

    @property
    def item_ids(self) -> list[int] | list[str] | None:
        """Ids of the items that it was trained on, in the order of their numbers; None before it is loaded."""
        return None if self.catalogue is None else self.catalogue.item_ids

    def _catalogue(self) -> ItemCatalog:
        return ItemCatalog.known_to(self.catalogue, self._data)

    @torch.no_grad()
    def recommend_to(self, batch: EvalBatch, k: int = 10) -> list[dict[str, Any]]:
        """Return the best items for the one user of a batch, as made by the data module's `user`.

        Each has `item`, `title` (None where the data have none) and `score`.

        Raises:
            ValueError: for a k above the number of items.
        """
        return self._catalogue().best(self.score_block(batch), batch, k)
