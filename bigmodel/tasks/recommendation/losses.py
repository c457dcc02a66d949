"""Losses of the next item, each a sum and a count: softmax over all items, or contrastive with sampled negatives.

A loss is constructed from its options; `prepare` sets the number of items and their counts; in each step::

    loss, count = self.loss(self.net, features, targets, DrawKeys.of(seed, step, batch.index, num_positions))

Sources: sampled softmax by importance sampling (Bengio and Senécal 2008, IEEE Transactions on Neural Networks 19); binary
cross-entropy as in SASRec (arXiv 1808.09781); gBCE (gSASRec, arXiv 2308.07192); BPR (arXiv 1205.2618). For ratings:
squared error (Koren et al. 2009, doi 10.1109/MC.2009.263).

B users, K items of a user, M positions (or pairs), D width, I items (numbered 1 to I; 0 is padding), n negatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bigmodel.nn.loss import IGNORE_INDEX, cross_entropy_sum
from bigmodel.tasks.recommendation.negatives import DrawKeys, Negatives

_NUMBERS_AT_ONCE = 1 << 24  # elements of the vectors of negatives: 64 MB


class ItemScorer(Protocol):
    """Net of a next-item loss."""

    def item_vectors(self, items: Tensor | None = None) -> Tensor:
        """Return vectors [..., D] of items [...]."""
        ...

    def logits(self, features: Tensor) -> Tensor:
        """Return scores [..., I + 1] of all items for features [..., D]; the score of padding is ignored."""
        ...


class NextItemLoss(Protocol):
    """Interface of `--model.loss`."""

    def prepare(self, num_items: int, counts: Tensor | None = None) -> None:
        """Set the number of items I, and the number of training events of each item [I + 1], int64.

        Raises:
            ValueError: if an option is invalid for these, or counts are required and missing.
        """
        ...

    def __call__(self, net: ItemScorer, features: Tensor, targets: Tensor, keys: DrawKeys) -> tuple[Tensor, Tensor]:
        """Return the sum over the positions with a target, in nats, a float32 scalar, and their number, int64.

        Args:
            net: computes vectors and scores of items.
            features: [..., D].
            targets: items [...] int64; 0: no target. Dropping such positions beforehand saves computation.
            keys: of the draws; `keys.positions` has the targets' shape.
        """
        ...


class FullSoftmax(nn.Module):
    """Cross-entropy of the softmax over all items.

    Args:
        chunk_size: positions whose scores of all items are in memory at once, recomputed in the backward pass; null: all of
            a micro-batch.
    """

    def __init__(self, chunk_size: int | None = None) -> None:
        super().__init__()
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"--model.loss.chunk_size {chunk_size}: must be at least 1, or null")
        self.chunk_size = chunk_size

    def prepare(self, num_items: int, counts: Tensor | None = None) -> None:
        pass

    def forward(self, net: ItemScorer, features: Tensor, targets: Tensor, keys: DrawKeys) -> tuple[Tensor, Tensor]:
        def logits(features: Tensor) -> Tensor:
            scores = net.logits(features)
            scores[..., 0] = -torch.inf  # in place: a copy would be the largest tensor of all
            return scores

        return cross_entropy_sum(logits, features, targets.masked_fill(targets == 0, IGNORE_INDEX), self.chunk_size)


class _SamplingLoss(nn.Module):
    """Options and draws shared by the sampling losses."""

    def __init__(self, num_negatives: int, popularity: bool) -> None:
        super().__init__()
        if num_negatives < 1:
            raise ValueError(f"--model.loss.num_negatives {num_negatives}: must be at least 1")
        self.num_negatives, self.popularity = num_negatives, popularity
        self.negatives: Any = None

    def prepare(self, num_items: int, counts: Tensor | None = None) -> None:
        if self.popularity and counts is None:
            raise ValueError(
                "--model.loss.popularity true needs the number of events of each item, which the data lack"
            )
        self.negatives = Negatives(num_items, counts if self.popularity else None)

    def _contrast(
        self,
        net: ItemScorer,
        features: Tensor,
        targets: Tensor,
        keys: DrawKeys,
        loss_of: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Return sum and count by `loss_of(positive [m], negative [m, n], hits [m, n], counted [m])`; negatives per
        position.
        """
        if keys.positions.shape != targets.shape:
            raise ValueError(
                f"keys {list(keys.positions.shape)} and targets {list(targets.shape)} must have the same shape"
            )
        features, targets, positions = features.flatten(0, -2), targets.flatten(), keys.positions.flatten()

        def chunk(features: Tensor, targets: Tensor, positions: Tensor) -> Tensor:
            items = self.negatives.draw(positions, self.num_negatives)  # [m, n]
            scored = torch.cat([targets[:, None], items], 1)  # [m, 1 + n]
            scores = (net.item_vectors(scored) @ features[:, :, None]).squeeze(2).float()  # [m, 1 + n, 1] -> [m, 1 + n]
            scores = scores + _bias(net, scored)
            return loss_of(scores[:, 0], scores[:, 1:], items == targets[:, None], targets > 0)[0]

        size = max(1, _NUMBERS_AT_ONCE // ((self.num_negatives + 1) * features.shape[1]))
        count = (targets > 0).sum()
        if size >= len(targets):
            return chunk(features, targets, positions), count
        parts = zip(features.split(size), targets.split(size), positions.split(size), strict=True)
        return torch.stack([checkpoint(chunk, *part, use_reentrant=False) for part in parts]).sum(), count


class SampledSoftmax(_SamplingLoss):
    """Cross-entropy of the softmax over the target and negatives that are shared by all positions of an optimizer step.

    Args:
        num_negatives: n, drawn with replacement.
        popularity: draw in proportion to training events instead of uniformly.
    """

    def __init__(self, num_negatives: int = 256, popularity: bool = False) -> None:
        super().__init__(num_negatives, popularity)

    def forward(self, net: ItemScorer, features: Tensor, targets: Tensor, keys: DrawKeys) -> tuple[Tensor, Tensor]:
        items = self.negatives.draw(keys.step, self.num_negatives)[0]  # [n]
        log_expected = self.negatives.log_probability(items) + math.log(self.num_negatives)
        return sampled_softmax_sum(net, features, targets, items, log_expected)


class BCE(_SamplingLoss):
    """Binary cross-entropy of each position's target and its own negatives, the mean over these n + 1 items.

    Args:
        num_negatives: n, drawn with replacement; 1 in SASRec.
        popularity: draw in proportion to training events instead of uniformly.
    """

    def __init__(self, num_negatives: int = 1, popularity: bool = False) -> None:
        super().__init__(num_negatives, popularity)

    def forward(self, net: ItemScorer, features: Tensor, targets: Tensor, keys: DrawKeys) -> tuple[Tensor, Tensor]:
        return self._contrast(net, features, targets, keys, bce_sum)


class GBCE(_SamplingLoss):
    """Generalised binary cross-entropy: a smaller weight of the target avoids overconfidence with few negatives.

    It looks up n vectors for each position: below some ten thousand items `FullSoftmax` is as fast on a CPU.

    Args:
        num_negatives: n, drawn uniformly with replacement.
        t: calibration, from 0 (binary cross-entropy) to 1 (scores as calibrated as those of the full softmax).
    """

    def __init__(self, num_negatives: int = 256, t: float = 0.75) -> None:
        super().__init__(num_negatives, popularity=False)
        if not 0 <= t <= 1:
            raise ValueError(f"--model.loss.t {t}: must be in 0 to 1")
        self.t, self.beta = t, 1.0

    def prepare(self, num_items: int, counts: Tensor | None = None) -> None:
        super().prepare(num_items)
        if self.num_negatives >= num_items:
            raise ValueError(
                f"--model.loss.num_negatives {self.num_negatives}: must be below the number of items, {num_items}, for"
                " GBCE; with few items, set --model.loss FullSoftmax"
            )
        self.beta = gbce_beta(self.num_negatives, num_items, self.t)

    def forward(self, net: ItemScorer, features: Tensor, targets: Tensor, keys: DrawKeys) -> tuple[Tensor, Tensor]:
        def loss_of(positive: Tensor, negative: Tensor, hits: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
            return bce_sum(positive, negative, hits, counted, self.beta)

        return self._contrast(net, features, targets, keys, loss_of)


class BPR(_SamplingLoss):
    """Bayesian personalised ranking of each position's target above its own negatives.

    Args:
        num_negatives: n, drawn with replacement.
        popularity: draw in proportion to training events instead of uniformly.
    """

    def __init__(self, num_negatives: int = 1, popularity: bool = False) -> None:
        super().__init__(num_negatives, popularity)

    def forward(self, net: ItemScorer, features: Tensor, targets: Tensor, keys: DrawKeys) -> tuple[Tensor, Tensor]:
        return self._contrast(net, features, targets, keys, bpr_sum)


class SquaredError(nn.Module):
    """Squared error of ratings, for PairRecommendation and a net with `ratings`, with an L2 penalty.

    With d the net's `ratings`, an event's loss is (r - mean - d)^2 + l2 (|p_u|^2 + |q_i|^2 + b_u^2 + b_i^2), eq. 5 of the
    source. The mean of the training ratings comes from the data, and is saved with the task.

    Args:
        l2: weight of the penalty on the vectors and biases of each event's user and item.
    """

    mean: Tensor

    def __init__(self, l2: float = 0.02) -> None:
        super().__init__()
        if not 0 <= l2 < math.inf:
            raise ValueError(f"--model.loss.l2 {l2}: must be 0 or above")
        self.l2 = l2
        self.register_buffer("mean", torch.zeros(()))

    def prepare(self, num_items: int, counts: Tensor | None = None) -> None:
        pass

    def predict(self, net: Any, users: Tensor, items: Tensor) -> Tensor:
        """Return predicted ratings [B, K] float32 of users [B] for items [B, K]; not clipped to a range."""
        ratings: Tensor = self.mean + net.ratings(users, items).float()
        return ratings

    def forward(self, net: Any, users: Tensor, items: Tensor, ratings: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum over events [B], and their number."""
        errors = ratings - self.predict(net, users, items[:, None])[:, 0]
        penalized = [net.features(users), net.item_vectors(items)]
        penalized += [
            bias[at, None] for bias, at in ((net.user_bias, users), (net.item_bias, items)) if bias is not None
        ]
        penalty = sum(values.float().square().sum() for values in penalized)
        return errors.square().sum() + self.l2 * penalty, torch.tensor(len(users), device=users.device)


def sampled_softmax_sum(
    net: ItemScorer, features: Tensor, targets: Tensor, items: Tensor, log_expected: Tensor
) -> tuple[Tensor, Tensor]:
    """Return sum and count of -log(exp(s_target) / (exp(s_target) + sum_j exp(s_j) / expected_j)) over negatives j.

    The sum over the negatives other than the target is an unbiased estimate of the sum over all items other than the
    target. The target is not drawn, so its score is not corrected. With each item once and log_expected 0, this is the
    full softmax.

    Args:
        net, features, targets: as for `NextItemLoss`.
        items: negatives [n] shared by all positions; a negative that is the target of a position is masked there.
        log_expected: [n], logarithm of the expected number of draws of each.
    """
    features, targets = features.flatten(0, -2), targets.flatten()
    # A single lookup: in the backward pass, each lookup creates a gradient as large as the whole table.
    vectors = net.item_vectors(torch.cat([targets, items]))
    positives, negatives = vectors[: len(targets)], vectors[len(targets) :]  # [M, D], [n, D]
    positive = (features * positives).sum(1, keepdim=True).float() + _bias(net, targets[:, None])  # [M, 1]
    negative = (features @ negatives.T).float() + _bias(net, items) - log_expected  # [M, n]
    scores = torch.cat([positive, negative.masked_fill(items == targets[:, None], -torch.inf)], 1)
    return _sum_and_count(scores.logsumexp(1) - scores[:, 0], targets > 0)


def bce_sum(
    positive: Tensor, negative: Tensor, hits: Tensor | None = None, counted: Tensor | None = None, beta: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return sum and count of -(beta log sigma(positive) + sum_j log(1 - sigma(negative_j))) / (n + 1).

    Args:
        positive: scores [M] of targets.
        negative: scores [M, n].
        hits: [M, n], True for negatives that are the target, which are masked; None: there are none.
        counted: [M], False for positions without a target; None: all have one.
        beta: weight of the target's part.
    """
    contrast = F.softplus(negative)  # -log(1 - sigma(x))
    if hits is not None:
        contrast = contrast.masked_fill(hits, 0)
    losses = (beta * F.softplus(-positive) + contrast.sum(1)) / (negative.shape[1] + 1)
    return _sum_and_count(losses, counted)


def gbce_beta(num_negatives: int, num_items: int, t: float) -> float:
    """Return the weight beta of the target's part for calibration t, with that many negatives out of num_items - 1."""
    share = num_negatives / (num_items - 1)
    return share * (t * (1 - 1 / share) + 1 / share)


def bpr_sum(
    positive: Tensor, negative: Tensor, hits: Tensor | None = None, counted: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return sum and count of -log sigma(positive - negative_j), the mean over n of them; arguments as for `bce_sum`.

    For a model of pairs (user, item): positive [P] and negative [P, n] scores of a user's items and of drawn ones.
    """
    losses = F.softplus(negative - positive[:, None])
    if hits is not None:
        losses = losses.masked_fill(hits, 0)
    return _sum_and_count(losses.mean(1), counted)


def _bias(net: Any, items: Tensor) -> Tensor | float:
    """Return the scores of items [...] that do not depend on features; 0 for a net without `item_bias` [I + 1]."""
    bias = getattr(net, "item_bias", None)
    return 0.0 if bias is None else bias[items].float()


def _sum_and_count(losses: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    if counted is None:
        counted = torch.ones_like(losses, dtype=torch.bool)
    return torch.where(counted, losses, 0).sum(), counted.sum()
