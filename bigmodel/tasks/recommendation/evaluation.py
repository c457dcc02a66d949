"""The evaluation that all recommenders share: full ranking, seen items masked, exact over processes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from bigmodel.tasks.recommendation.batches import EvalBatch
from bigmodel.tasks.recommendation.metrics import RankingMetrics
from bigmodel.tasks.recommendation.ranking import ScoreBlock, rank_and_top_k


class Evaluation(nn.Module):
    """Ranks targets among all items but the history, and takes means over users.

    Args:
        cutoffs: lengths k of lists; those above the number of items are left out.
    """

    def __init__(self, cutoffs: Sequence[int]) -> None:
        super().__init__()
        RankingMetrics(cutoffs)  # refuses what cannot be
        self.cutoffs = tuple(cutoffs)
        self.num_items = 0
        self.metrics: RankingMetrics | None = None

    def prepare(self, num_items: int, counts: Tensor | None) -> None:
        """Take what the data know: I, and the training events of each item [I + 1]; without these, coverage and popularity
        are not measured."""
        self.num_items = num_items
        self.cutoffs = tuple(k for k in self.cutoffs if k <= num_items) or (num_items,)
        self.metrics = RankingMetrics(self.cutoffs, counts)

    def update(self, score_block: ScoreBlock, batch: EvalBatch) -> None:
        """Take in a batch of users."""
        assert self.metrics is not None
        targets = batch.targets * (batch.weight > 0)[:, None]  # rows that only fill up have none
        ranks, lists = rank_and_top_k(score_block, self.num_items, max(self.cutoffs), targets, batch.history)
        self.metrics.update(ranks, lists if self.metrics.counts is not None else None)

    def compute(self, split: str) -> dict[str, Tensor]:
        """By name, `val/ndcg@10`; every process must call it."""
        assert self.metrics is not None
        values = self.metrics.compute()
        self.metrics.reset()
        return {f"{split}/{name}": value for name, value in values.items()}
