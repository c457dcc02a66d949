"""Ranks of a user's targets among all items, and the k best items: exact, in blocks of items.

A list is ordered by score. The user's history is excluded from it, the targets never are. Ties count against the
targets: every other item of equal score is ranked before them, so that constant scores rank last, not first. Items are
not sorted, and only the scores of one block are in memory.

B users, D width, H items of the longest history, I items (numbered 1 to I; 0 is padding), K targets of a user, k length of a
list, W items of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

ScoreBlock = Callable[[int, int], Tensor]
"""(first, last) -> scores [B, last - first] of the items first to last - 1, the same in each call.

Scores are of any floating-point type and compared in float32. -inf excludes an item from recommendation.
"""
_SCORES_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 24}  # 16 and 64 MB, and up to ten times that for the top k
_LOW = 0xFFFFFFFF
_MAGNITUDE = 0x7FFFFFFF


def dot_products(queries: Tensor, table: Tensor, bias: Tensor | None = None) -> ScoreBlock:
    """Return dot products of queries [B, D] and the rows of a table [I + 1, D], plus an optional bias [I + 1].

    Always in float32, also under autocast: bfloat16 would create many ties.
    """
    queries = queries.float()

    def score_block(first: int, last: int) -> Tensor:
        with torch.autocast(queries.device.type, enabled=False):
            scores = queries @ table[first:last].float().T
        return scores if bias is None else scores + bias[first:last].float()

    return score_block


@torch.no_grad()
def rank(
    score_block: ScoreBlock, num_items: int, targets: Tensor, history: Tensor, block_size: int | None = None
) -> Tensor:
    """Return the ranks of the targets, from 1, among all items except the history.

    A target's rank is the number of items that score at least as high, including itself; of two tied targets, one is
    ranked before the other. All scores are computed once, or twice if there is more than one block.

    Args:
        score_block: the scores of all B users, block by block.
        num_items: I.
        targets: [B, K] int64, each item at most once in a row, padded with 0 anywhere.
        history: [B, H] int64, padded with 0; an item may occur more than once, or be a target.
        block_size: W; None: as many as fit in 4 million scores (16 million on a GPU).

    Returns:
        [B, K] int64, 0 where there is no target.

    Raises:
        ValueError: for NaN scores, infinite scores of targets, or items out of range.
    """
    blocks = _ScoreBlocks(score_block, num_items, history, block_size)
    counter = _RankCounter(blocks, targets)
    for first, scores in blocks.masked(counter):
        counter.add(first, scores)
    return counter.ranks()


@torch.no_grad()
def top_k(
    score_block: ScoreBlock, num_items: int, k: int, history: Tensor, block_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the k items with the highest scores that are not in the history, best first; ties: the lower number first.

    Args:
        score_block, num_items, history, block_size: as for `rank`.
        k: length of the list, 1 to I.

    Returns:
        Items [B, k] int64 and their scores [B, k] float32; 0 and -inf at the end where fewer items remain.

    Raises:
        ValueError: for NaN scores, or k or items out of range.
    """
    blocks = _ScoreBlocks(score_block, num_items, history, block_size)
    best = _TopK(blocks, k)
    for first, scores in blocks.masked():
        best.add(first, scores)
    return best.lists()


@torch.no_grad()
def rank_and_top_k(
    score_block: ScoreBlock, num_items: int, k: int, targets: Tensor, history: Tensor, block_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return ranks [B, K] as `rank`, and the items [B, k] of the ranked list, from the same scores.

    Unlike in `top_k`, the list may contain targets that are in the history.
    """
    blocks = _ScoreBlocks(score_block, num_items, history, block_size)
    counter, best = _RankCounter(blocks, targets), _TopK(blocks, k)
    for first, scores in blocks.masked(counter):
        counter.add(first, scores)
        best.add(first, scores)
    return counter.ranks(), best.lists()[0]


@torch.no_grad()
def scores_of(score_block: ScoreBlock, num_items: int, items: Tensor, block_size: int | None = None) -> Tensor:
    """Return scores [B, n] float32 of items [B, n] int64; 0 for padding (0)."""
    return _ScoreBlocks(score_block, num_items, items, block_size).gather(items)


@torch.no_grad()
def sampled_rank(
    score_block: ScoreBlock, num_items: int, targets: Tensor, negatives: Tensor, block_size: int | None = None
) -> Tensor:
    """Return ranks of the targets, each among the negatives of its user only: for metrics called `sampled_...`.

    They order models differently from ranks among all items (Krichene and Rendle 2020), and are comparable only at the
    same number of negatives, drawn in the same way.

    Args:
        score_block, num_items, targets, block_size: as for `rank`.
        negatives: [B, n] int64, items that are not targets, padded with 0 (`negatives.evaluation_negatives`).

    Returns:
        [B, K] int64, 0 where there is no target; ties count against the target.
    """
    scores = scores_of(score_block, num_items, torch.cat([targets, negatives], 1), block_size)
    if not scores.isfinite().all():
        raise ValueError("a score is not finite: training has diverged. Set a lower --model.optimizer.lr")
    values, others = scores[:, : targets.shape[1]], scores[:, targets.shape[1] :]
    others = others.masked_fill(negatives == 0, -torch.inf)
    ranks = 1 + (others[:, None, :] >= values[:, :, None]).sum(2)  # [B, K, n] -> [B, K]
    return ranks.masked_fill_(targets == 0, 0)


class _ScoreBlocks:
    """Scores of all items, block by block."""

    def __init__(self, score_block: ScoreBlock, num_items: int, history: Tensor, block_size: int | None) -> None:
        if num_items < 1:
            raise ValueError(f"num_items is {num_items}, but must be at least 1")
        _check_items("histories", history, num_items)
        if block_size is None:
            at_once = _SCORES_AT_ONCE.get(history.device.type, _SCORES_AT_ONCE["cpu"])
            block_size = max(1, at_once // max(1, len(history)))
        elif block_size < 1:
            raise ValueError(f"block_size is {block_size}, but must be at least 1 or None")
        self.score_block, self.num_items, self.history = score_block, num_items, history
        self.bounds = [(first, min(first + block_size, num_items + 1)) for first in range(1, num_items + 1, block_size)]
        self._single: Tensor | None = None  # scores, if there is only one block

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """Yield first item and scores [B, W] float32 of each block."""
        for first, last in self.bounds:
            scores = self.score_block(first, last) if self._single is None else self._single
            if scores.shape != (len(self.history), last - first):
                raise ValueError(
                    f"scores of {last - first} items for {len(self.history)} users have shape {list(scores.shape)}"
                )
            scores = scores.float()
            if len(self.bounds) == 1:
                self._single = scores
            yield first, scores

    def gather(self, items: Tensor) -> Tensor:
        """Return scores [B, n] of items [B, n]; 0 for padding."""
        gathered = torch.zeros(items.shape, device=items.device)
        for first, scores in self:
            columns, inside = _columns(items, first, scores)
            gathered = torch.where(inside, scores.gather(1, columns), gathered)
        return gathered

    def masked(self, counter: _RankCounter | None = None) -> Iterator[tuple[int, Tensor]]:
        """Iterate over blocks with -inf for the history, except for the counter's targets."""
        highest = torch.full((len(self.history), 1), -torch.inf, device=self.history.device)
        for first, scores in self:
            highest = torch.maximum(highest, scores.amax(1, keepdim=True))  # a NaN propagates
            columns, inside = _columns(self.history, first, scores)
            # The minimum with +inf changes nothing; several writes to one column are harmless.
            mask = _infinity(scores, columns).masked_fill_(inside, -torch.inf)
            scores = scores.scatter_reduce(1, columns, mask, "amin")  # a copy: the scores may be used elsewhere
            if counter is not None:
                columns, inside = _columns(counter.targets, first, scores)
                restored = torch.where(inside, counter.values, -_infinity(scores, columns))
                scores.scatter_reduce_(1, columns, restored, "amax")
            yield first, scores
        if highest.isnan().any():
            raise ValueError("scores are NaN: training has diverged. Set a lower --model.optimizer.lr")


class _RankCounter:
    """Counts the items that score below each target."""

    def __init__(self, blocks: _ScoreBlocks, targets: Tensor) -> None:
        _check_items("targets", targets, blocks.num_items)
        if targets.ndim != 2 or len(targets) != len(blocks.history) or not targets.shape[1]:
            raise ValueError(
                f"targets have shape {list(targets.shape)}, but {len(blocks.history)} users need [B, K] of them"
            )
        self.num_items, self.targets = blocks.num_items, targets
        self.values = blocks.gather(targets)
        if not self.values.isfinite().all():
            raise ValueError(
                "the score of a target is not finite: training has diverged. Set a lower --model.optimizer.lr"
            )
        # Ascending; +inf after the last target of a row.
        self.ascending, self.order = self.values.masked_fill(targets == 0, torch.inf).sort(dim=1, stable=True)
        self.below = torch.zeros_like(targets)  # in the order of `ascending`
        # Users by number of targets, so that the j-th target is processed only for those that have one.
        num_targets = (targets > 0).sum(1)
        self.users = num_targets.argsort(descending=True, stable=True) if targets.shape[1] > 1 else None
        slots = torch.arange(targets.shape[1], device=targets.device)
        self.num_users: list[int] = (num_targets[:, None] > slots).sum(0).tolist()

    def add(self, first: int, scores: Tensor) -> None:
        """Add scores [B, W], masked."""
        if self.users is None:
            self.below[:, 0] += (scores < self.ascending).sum(1, dtype=torch.int32)
            return
        scores, ascending = scores[self.users], self.ascending[self.users]
        for slot, n in enumerate(self.num_users):
            below = (scores[:n] < ascending[:n, slot, None]).sum(1, dtype=torch.int32)
            self.below[self.users[:n], slot] += below

    def ranks(self) -> Tensor:
        """Return ranks [B, K], in the order of the targets."""
        # Masked items score below any target. Equal targets: each is ranked after those before it in `ascending`.
        equals = torch.searchsorted(self.ascending, self.ascending)
        num_equal_before = torch.arange(equals.shape[1], device=equals.device) - equals
        ranks = self.num_items - self.below - num_equal_before
        ranks = torch.zeros_like(ranks).scatter_(1, self.order, ranks)
        return ranks.masked_fill_(self.targets == 0, 0)


class _TopK:
    """The k best items so far, as integers that sort by score, then by item."""

    def __init__(self, blocks: _ScoreBlocks, k: int) -> None:
        if not 1 <= k <= blocks.num_items:
            raise ValueError(f"k is {k}, but must be in 1 to {blocks.num_items}, the number of items")
        self.k, self.device = k, blocks.history.device
        self.keys = torch.empty(len(blocks.history), 0, dtype=torch.int64, device=self.device)

    def add(self, first: int, scores: Tensor) -> None:
        """Add scores [B, W], masked."""
        k, width = min(self.k, scores.shape[1]), scores.shape[1]
        values, columns = scores.topk(min(k + 1, width))
        if width > k and (values[:, k - 1] == values[:, k]).any():  # `topk` may have taken any of these ties
            values, columns = scores, torch.arange(width, device=self.device)
        keys = pack(values, first + columns)
        keys = torch.cat([self.keys, keys.topk(k).values], 1)
        self.keys = keys.topk(min(self.k, keys.shape[1])).values

    def lists(self) -> tuple[Tensor, Tensor]:
        scores, items = unpack(self.keys)
        return items.masked_fill_(scores == -torch.inf, 0), scores


def pack(scores: Tensor, items: Tensor) -> Tensor:
    """Pack scores (float32, not NaN) and items (below 2^32) into int64 that sort by score, and by lower item for ties.

    `torch.topk` of scores may return any of equal scores; packed numbers are all different.
    """
    bits = (scores + 0.0).view(torch.int32)  # -0 becomes 0
    bits.bitwise_xor_((bits >> 31).bitwise_and_(_MAGNITUDE))  # negative numbers are stored by magnitude
    return bits.long().mul_(1 << 32).bitwise_or_(_LOW - items)


def unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores and items of `pack`."""
    bits = (keys >> 32).int()
    scores = (bits ^ (bits >> 31).bitwise_and_(_MAGNITUDE)).view(torch.float32)
    return scores, _LOW - (keys & _LOW)


def _columns(items: Tensor, first: int, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns [B, n] of items [B, n] in a block of scores, and True for those inside the block."""
    columns = items - first
    inside = (columns >= 0) & (columns < scores.shape[1])
    return columns.clamp_(0, scores.shape[1] - 1), inside


def _infinity(scores: Tensor, columns: Tensor) -> Tensor:
    return scores.new_full(columns.shape, torch.inf)


def _check_items(name: str, items: Tensor, num_items: int) -> None:
    if items.dtype != torch.int64:
        raise ValueError(f"{name} are {items.dtype}, but item numbers must be int64")
    if items.numel() and not 0 <= int(items.min()) <= int(items.max()) <= num_items:
        raise ValueError(
            f"{name} have items {int(items.min())} to {int(items.max())}, but must be in 1 to {num_items}, or 0 (padding)"
        )
