"""Metrics of a recommender over all processes: sums over users, and the set of recommended items.

Each metric is a mean over users, computed from the ranks of their targets in their lists (NDCG: Järvelin and
Kekäläinen 2002, with gain 1 per target). With r_1 < r_2 < ... the ranks of a user's n targets, and [..] 1 or 0::

    hr@k        [r_1 <= k]                      1 if a target is in the list
    recall@k    sum_i [r_i <= k] / n            equals hr@k if each user has one target
    precision@k sum_i [r_i <= k] / k
    ndcg@k      sum_i [r_i <= k] / log2(r_i + 1)  /  sum_{i <= min(k, n)} 1 / log2(i + 1)
    mrr@k       [r_1 <= k] / r_1,               mrr the same over all items
    coverage@k    share of all items that are in the list of a user
    popularity@k  training events of an item in a list, mean over lists and positions

Errors of predicted ratings are over all targets of all users, each counted once::

    rmse        root of the mean squared error          mae         mean absolute error

B users, K targets of a user, k length of a list, L lengths in all, I items (numbered 1 to I; 0 is padding).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, MetricCollection

from bigmodel.nn.accumulation import Accumulates, accumulable, accumulation_dtype
from bigmodel.tasks.recommendation.negatives import check_counts

UNRANKED = 1 << 62
"""Rank of a target that no list contains: a miss at each k, with a reciprocal rank of 0."""
_BY_CUTOFF = ("hr", "recall", "precision", "ndcg", "mrr")


class RankingMetrics(Accumulates, Metric):
    """Means over users, in the device's `accumulation_dtype` until they are reported.

    Args:
        topk: lengths of the lists, k.
        counts: training events of each item [I + 1], int64: `coverage` and `popularity` are computed, and `update`
            needs lists. None: they are not computed.
        prefix: of each name: "sampled_" if targets were ranked among a sample of the items.

    Raises:
        ValueError: if topk has values below 1 or duplicates or is empty; for invalid counts.
    """

    full_state_update = False
    higher_is_better = True
    lengths: Tensor
    ideal: Tensor
    counts: Tensor | None
    num_users: Tensor
    sums: Tensor
    reciprocal: Tensor
    places: Tensor
    events: Tensor

    def __init__(self, topk: Sequence[int] = (10,), counts: Tensor | None = None, prefix: str = "") -> None:
        super().__init__()
        if not topk or min(topk) < 1 or len(set(topk)) < len(topk):
            raise ValueError(f"--model.topk {list(topk)} must be different lengths of lists, each at least 1")
        self.topk, self.prefix = tuple(topk), prefix
        self.longest = max(topk)
        dtype = accumulation_dtype()
        discounts = 1 / torch.arange(2, self.longest + 2, dtype=dtype).log2()
        self.register_buffer("lengths", torch.tensor(self.topk), persistent=False)
        self.register_buffer("ideal", torch.cat([torch.zeros(1, dtype=dtype), discounts.cumsum(0)]), persistent=False)
        self.add_state("num_users", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros(len(_BY_CUTOFF), len(topk), dtype=dtype), dist_reduce_fx="sum")
        self.add_state("reciprocal", torch.zeros((), dtype=dtype), dist_reduce_fx="sum")
        self.register_buffer("counts", None, persistent=False)
        if counts is not None:
            self.counts = check_counts(counts, len(counts) - 1)
            # The best position of each item in any list; larger than any position if it was in none.
            self.add_state("places", torch.full_like(self.counts, self.longest + 1), dist_reduce_fx="min")
            self.add_state("events", torch.zeros(2, len(topk), dtype=torch.int64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, ranks: Tensor, items: Tensor | None = None) -> None:
        """Update with a batch of users; users without a target are not counted.

        Args:
            ranks: [B, K] int64 from 1, 0 where there is no target, as returned by `ranking.rank`; or UNRANKED.
            items: lists [B, k] int64, the best item first, 0 after the end; at least as long as the largest cutoff.

        Raises:
            ValueError: for other shapes, or lists that are missing or too short.
        """
        if ranks.ndim != 2:
            raise ValueError(f"ranks have shape {list(ranks.shape)}, but must have [B, K]")
        found = ranks > 0  # [B, K]
        counted = found.any(1)
        within = found[:, :, None] & (ranks[:, :, None] <= self.lengths)  # [B, K, L]
        num_targets = found.sum(1)[:, None]  # [B, 1]
        hits = accumulable(within.sum(1))  # [B, K, L] -> [B, L]
        gains = (within / accumulable((ranks + 1).clamp(min=2)).log2()[:, :, None]).sum(1)
        best = ranks.masked_fill(~found, torch.iinfo(ranks.dtype).max).amin(1) if ranks.shape[1] else ranks.sum(1)
        reciprocal = torch.where(counted & (best < UNRANKED), 1 / accumulable(best), 0)  # [B]
        users = (
            accumulable(hits > 0),
            hits / num_targets.clamp(min=1),
            hits / self.lengths,
            gains / self.ideal[torch.minimum(num_targets, self.lengths).clamp(min=1)],
            torch.where(hits > 0, reciprocal[:, None], 0),
        )
        self.num_users += counted.sum()
        self.sums += torch.stack([values.sum(0) for values in users])
        self.reciprocal += reciprocal.sum()
        if self.counts is not None:
            self._update_lists(items, counted, self.counts)

    def _update_lists(self, items: Tensor | None, counted: Tensor, counts: Tensor) -> None:
        if items is None or items.ndim != 2 or items.shape[0] != len(counted) or items.shape[1] < self.longest:
            raise ValueError(
                f"lists have shape {None if items is None else list(items.shape)}, but coverage and popularity at"
                f" {self.longest} need [{len(counted)}, {self.longest}]"
            )
        items = items[:, : self.longest].masked_fill(~counted[:, None], 0)
        place = torch.arange(1, self.longest + 1, device=items.device).expand_as(items)
        self.places.scatter_reduce_(0, items.flatten(), place.flatten(), "amin")  # 0 goes to padding
        listed = torch.stack([counts[items] * (items > 0), (items > 0).long()])  # [2, B, longest]
        self.events += listed.sum(1).cumsum(1)[:, self.lengths - 1]

    def compute(self) -> dict[str, Tensor]:
        """Return metrics over all users of all processes since the last `reset`, float32 by name (`ndcg@10`).

        Every process must call it.

        Raises:
            ValueError: if there was no user with a target.
        """
        if self.num_users == 0:
            raise ValueError("no user with a target was evaluated")
        values = {"mrr": self.reciprocal / self.num_users}
        means = self.sums / self.num_users
        for j, k in enumerate(self.topk):
            values |= {f"{name}@{k}": means[i, j] for i, name in enumerate(_BY_CUTOFF)}
            if self.counts is not None:
                values[f"coverage@{k}"] = accumulable(self.places[1:] <= k).mean()
                values[f"popularity@{k}"] = accumulable(self.events[0, j]) / self.events[1, j].clamp(min=1)
        return {self.prefix + name: value.float() for name, value in values.items()}


class RatingErrors(Accumulates, MetricCollection):
    """`rmse` and `mae` of predicted ratings [n] and true ratings [n], in the device's `accumulation_dtype`."""

    def __init__(self) -> None:
        super().__init__({"rmse": MeanSquaredError(squared=False), "mae": MeanAbsoluteError()}, compute_groups=False)
        self.set_dtype(accumulation_dtype())
