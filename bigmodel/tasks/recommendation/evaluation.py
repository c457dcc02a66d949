"""Evaluation of all recommenders: full ranking, by the rule for seen items that lists follow too, exact over processes.

B users, I items (numbered 1 to I; 0 is padding), K targets, k length of a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from bigmodel.data.cache import say
from bigmodel.nn.accumulation import accumulable
from bigmodel.tasks.recommendation.batches import EvalBatch
from bigmodel.tasks.recommendation.metrics import UNRANKED, RankingMetrics, RatingErrors
from bigmodel.tasks.recommendation.negatives import evaluation_negatives
from bigmodel.tasks.recommendation.ranking import ScoreBlock, rank_and_top_k, sampled_rank

Seen = Literal["mask", "keep", "drop_targets"]
"""Rule for items that are in a user's history, see `Evaluation`."""
_SEED = 0  # of sampled metrics: fixed, so that every model is evaluated on the same items


class Evaluation(nn.Module):
    """Rank targets among all items that may be recommended, and average over users; errors of ratings over all targets.

    A target that occurs more than once for a user counts once.

    Args:
        topk: lengths k of lists; one above the number of items has all items.
        num_eval_negatives: number of items drawn per user, not of the history and not targets, among which each target
            is also ranked, for metrics called `sampled_...`. They rank models differently from full ranking (Krichene
            and Rendle 2020, doi 10.1145/3394486.3403226). None: only full ranking.
        seen: rule for items of the history, in evaluation and in lists. `mask`: lists contain none, so that a target of the
            history is a miss. `keep`: lists may contain them, and targets are ranked among all items. `drop_targets`: lists
            contain none, and targets of the history are not evaluated.
    """

    def __init__(self, topk: Sequence[int], num_eval_negatives: int | None = None, seen: Seen = "mask") -> None:
        super().__init__()
        RankingMetrics(topk)  # checks topk
        if num_eval_negatives is not None and num_eval_negatives < 1:
            raise ValueError(
                f"--model.num_eval_negatives {num_eval_negatives}: must be at least 1, or null for full ranking only"
            )
        if seen not in get_args(Seen):
            raise ValueError(f"--model.seen {seen!r}: must be one of {', '.join(get_args(Seen))}")
        self.topk, self.num_eval_negatives, self.seen = tuple(topk), num_eval_negatives, seen
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
        if longer := [k for k in self.topk if k > num_items]:
            say(
                f"--model.topk {', '.join(map(str, longer))}: above the number of items, {num_items:,}; lists have all items"
            )
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
        rated = batch.targets * (batch.weight > 0)[:, None]  # padding rows have none
        targets = rated.masked_fill(repeats(rated), 0)
        seen = (
            _contained(targets, batch.history) if self.seen != "keep" else torch.zeros_like(targets, dtype=torch.bool)
        )
        targets = targets.masked_fill(seen, 0)
        missed = seen & (self.seen == "mask")
        longest = max(self.topk)
        history = self.excluded(batch)
        ranks, lists = rank_and_top_k(score_block, self.num_items, min(longest, self.num_items), targets, history)
        lists = nn.functional.pad(lists, (0, longest - lists.shape[1]))
        ranks = ranks.masked_fill(missed, UNRANKED)
        self.metrics.update(ranks, lists if self.metrics.counts is not None else None)
        if self.sampled is not None and self.num_eval_negatives is not None:
            excluded = torch.cat([history, targets], 1)
            drawn = evaluation_negatives(_SEED, batch.users, self.num_items, self.num_eval_negatives, excluded)
            ranks = sampled_rank(score_block, self.num_items, targets, drawn)
            self.sampled.update(ranks.masked_fill(missed, UNRANKED))
        if ratings is not None and batch.ratings is not None:
            self.errors.update(accumulable(ratings[rated > 0]), accumulable(batch.ratings[rated > 0]))

    def excluded(self, batch: EvalBatch) -> Tensor:
        """Return the items [B, H] that lists of a batch's users must not contain."""
        return batch.history[:, :0] if self.seen == "keep" else batch.history

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


def repeats(items: Tensor) -> Tensor:
    """Return True where an item [B, K] occurs earlier in its row."""
    ordered, order = items.sort(dim=1, stable=True)
    again = torch.zeros_like(items, dtype=torch.bool)
    again[:, 1:] = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] > 0)
    return torch.zeros_like(again).scatter_(1, order, again)


def _contained(items: Tensor, history: Tensor) -> Tensor:
    """Return True where an item [B, K] is in the history [B, H] of its row."""
    if not history.shape[1]:
        return torch.zeros_like(items, dtype=torch.bool)
    ordered = history.sort(dim=1).values
    place = torch.searchsorted(ordered, items).clamp_(max=history.shape[1] - 1)
    return (ordered.gather(1, place) == items) & (items > 0)
