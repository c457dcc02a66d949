"""Evaluation of all recommenders: full ranking, items of the history masked, exact over processes.

B users, I items (numbered 1 to I; 0 is padding), K targets, k length of a list.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bigmodel.nn.accumulation import accumulable
from bigmodel.tasks.recommendation.batches import EvalBatch
from bigmodel.tasks.recommendation.metrics import RankingMetrics, RatingErrors
from bigmodel.tasks.recommendation.negatives import evaluation_negatives
from bigmodel.tasks.recommendation.ranking import ScoreBlock, rank_and_top_k, sampled_rank

_SEED = 0  # of sampled metrics: fixed, so that every model is evaluated on the same items


class Evaluation(nn.Module):
    """Rank targets among all items except the history, and average over users; errors of ratings over all targets.

    Args:
        topk: lengths k of lists; those above the number of items are ignored.
        num_eval_negatives: number of items drawn per user, not of the history and not targets, among which each target
            is also ranked, for metrics called `sampled_...`. They rank models differently from full ranking (Krichene
            and Rendle 2020, doi 10.1145/3394486.3403226). None: only full ranking.
    """

    def __init__(self, topk: Sequence[int], num_eval_negatives: int | None = None) -> None:
        super().__init__()
        RankingMetrics(topk)  # checks topk
        if num_eval_negatives is not None and num_eval_negatives < 1:
            raise ValueError(
                f"--model.num_eval_negatives {num_eval_negatives}: must be at least 1, or null for full ranking only"
            )
        self.topk, self.num_eval_negatives = tuple(topk), num_eval_negatives
        self.num_items = 0
        self.metrics: RankingMetrics | None = None
        self.sampled: RankingMetrics | None = None
        self.errors = RatingErrors()

    def prepare(self, num_items: int, counts: Tensor | None) -> None:
        """Set I, and the training events of each item [I + 1]; without these, coverage and popularity are not computed.

        Raises:
            ValueError: if there are at least as many negatives as items.
        """
        self.num_items = num_items
        self.topk = tuple(k for k in self.topk if k <= num_items) or (num_items,)
        self.metrics = RankingMetrics(self.topk, counts)
        if self.num_eval_negatives is not None:
            if self.num_eval_negatives >= num_items:
                raise ValueError(
                    f"--model.num_eval_negatives {self.num_eval_negatives}: must be below the number of items,"
                    f" {num_items:,}, or null for full ranking only"
                )
            num_ranked = self.num_eval_negatives + 1
            self.sampled = RankingMetrics([k for k in self.topk if k < num_ranked] or [num_ranked], prefix="sampled_")

    def update(self, score_block: ScoreBlock, batch: EvalBatch, ratings: Tensor | None = None) -> None:
        """Update the metrics with a batch of users.

        Args:
            score_block: their scores.
            batch: their histories and targets.
            ratings: [B, K], predicted ratings of the targets, if any.
        """
        assert self.metrics is not None
        targets = batch.targets * (batch.weight > 0)[:, None]  # padding rows have none
        ranks, lists = rank_and_top_k(score_block, self.num_items, max(self.topk), targets, batch.history)
        self.metrics.update(ranks, lists if self.metrics.counts is not None else None)
        if self.sampled is not None and self.num_eval_negatives is not None:
            excluded = torch.cat([batch.history, targets], 1)
            drawn = evaluation_negatives(_SEED, batch.users, self.num_items, self.num_eval_negatives, excluded)
            self.sampled.update(sampled_rank(score_block, self.num_items, targets, drawn))
        if ratings is not None and batch.ratings is not None:
            rated = targets > 0
            self.errors.update(accumulable(ratings[rated]), accumulable(batch.ratings[rated]))

    def compute(self, split: str) -> dict[str, Tensor]:
        """Return the metrics by name, `val/ndcg@10`; every process must call it."""
        assert self.metrics is not None
        values = self.metrics.compute()
        self.metrics.reset()
        if self.sampled is not None:
            values |= self.sampled.compute()
            self.sampled.reset()
        if self.errors["rmse"].update_called:  # by every process or none, because all have the same number of batches
            values |= {name: value.float() for name, value in self.errors.compute().items()}
            self.errors.reset()
        return {f"{split}/{name}": value for name, value in values.items()}
