"""Recommendation: predict the next item of a user from the history.

Two trained tasks differ in their inputs. `SequentialRecommendation` takes ordered histories, also of new users (RecBole:
sequential recommendation). `PairRecommendation` takes the number of a training user (RecBole: general recommendation).
Both are evaluated by ranking all items.

B rows, T positions, D width, I items (numbered 1 to I; 0 is padding), H items of a history, K targets, k length of a list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bigmodel.data.cache import say
from bigmodel.data.stateless_rng import uniform
from bigmodel.nn import MatrixFactorization, SASRec
from bigmodel.nn.loss import IGNORE_INDEX
from bigmodel.run import sizes
from bigmodel.tasks.recommendation.batches import EvalBatch, PairBatch, SequenceBatch
from bigmodel.tasks.recommendation.evaluation import Seen
from bigmodel.tasks.recommendation.losses import BPR, FullSoftmax, SquaredError
from bigmodel.tasks.recommendation.negatives import DrawKeys
from bigmodel.tasks.recommendation.ranking import ScoreBlock, dot_products
from bigmodel.tasks.recommendation.recommender import Recommender
from bigmodel.training import optimizers, schedules

_MASKS, _LAST_ONLY = 1, 2  # streams of random numbers
_MAX_SECONDS = 10**11  # times from this number on are in milliseconds


class SequentialRecommendation(Recommender):
    """Train and evaluate a net that scores each next item of a history, and recommend items with it.

    A net with a `mask_item` (BERT4Rec) is trained to predict masked items instead; it recommends its predictions for a
    mask at the end.

    Args:
        net: factory of the net, called with `num_items` and `max_length`, taken from the data.
        loss: of the next items: FullSoftmax (by default), SampledSoftmax, BCE, GBCE, all of bigmodel.tasks.recommendation.
        optimizer: factory of the optimizer, called with parameter groups.
        schedule: learning rate schedule over the run's optimizer steps; null: constant.
        topk: lengths k of the evaluated lists.
        mask_ratio: share of masked items, for nets with a `mask_item`.
        mask_last_ratio: share of the windows in which only the last item is masked, as in recommendation; likewise.
        seed: with the optimizer step and the sample, determines negatives and masks.
        num_eval_negatives: number of items drawn per user among which each target is also ranked, for metrics
            `sampled_...`, which are comparable only at the same number; null: rank among all items only.
        seen: rule for items of the history, in evaluation, `predict` and `recommend`. `mask`: lists contain none, and a
            target of the history is a miss; `keep`: lists may contain them; `drop_targets`: lists contain none, and
            targets of the history are not evaluated.

    Logs `val/ndcg@k`, `hr@k`, `recall@k`, `precision@k`, `mrr@k`, `coverage@k`, `popularity@k` and `mrr`, and the same for
    `test`.
    """

    count_unit = "items"
    example_type = "sequences"  # type of the training samples

    def __init__(
        self,
        net: Callable[[int, int], nn.Module] = SASRec,
        loss: nn.Module | None = None,
        optimizer: optimizers.OptimizerFactory = torch.optim.AdamW,
        schedule: schedules.Schedule | None = None,
        topk: Sequence[int] = (5, 10, 20),
        mask_ratio: float = 0.3,
        mask_last_ratio: float = 0.1,
        seed: int = 0,
        num_eval_negatives: int | None = None,
        seen: Seen = "mask",
    ) -> None:
        super().__init__(topk, num_eval_negatives, optimizer, schedule, seen)
        for name, rate in (("mask_ratio", mask_ratio), ("mask_last_ratio", mask_last_ratio)):
            if not 0 <= rate <= 1:
                raise ValueError(f"--model.{name} {rate}: must be in 0 to 1")
        self.make_net = net
        self.loss: Any = loss if loss is not None else FullSoftmax()
        self.mask_ratio, self.mask_last_ratio, self.seed = mask_ratio, mask_last_ratio, seed
        self.median_gap: int | None = None  # between two training events of a user [s]; None: unknown

    def configure_model(self) -> None:
        if self.net is not None:
            return
        if isinstance(self.loss, SquaredError) and self.example_type != "pairs":
            raise ValueError(
                "--model.loss SquaredError is for pairs of users and items: set --model PairRecommendation"
            )
        net_sizes = sizes(self)
        self.net = self.make_net(**net_sizes)  # type: ignore[call-arg]
        self.loss.prepare(net_sizes["num_items"], self._prepare_evaluation(net_sizes["num_items"]))

    # SupportsLogits: for distillation, evaluation and export.

    def features(self, batch: Any) -> Tensor:
        """Return the features: [B, T, D] after each position of training windows; [B, D] after each history."""
        if isinstance(batch, SequenceBatch):
            items, _ = self._windows(batch)
            features: Tensor = self.net.features(items, batch.times)
            return features
        items = self.net.mask_last(batch.items) if hasattr(self.net, "mask_item") else batch.items
        return self.net.features(items, batch.times)[:, -1]

    def logits(self, features: Tensor) -> Tensor:
        """Map features [..., D] to logits [..., I + 1], -inf for padding."""
        scores: Tensor = self.net.logits(features).clone()
        scores[..., 0] = -torch.inf
        return scores

    def targets(self, batch: Any) -> Tensor:
        """Return the target items: [B, T] of training windows, [B] (the first) of histories; -100 where there is none."""
        targets = self._windows(batch)[1] if isinstance(batch, SequenceBatch) else batch.targets[:, 0]
        padding = (batch.weight == 0).view(-1, *[1] * (targets.ndim - 1))
        return targets.masked_fill((targets == 0) | padding, IGNORE_INDEX)

    @property
    def label_space(self) -> list[int] | list[str]:
        """Ids of the items, in the order of their numbers."""
        return self._item_catalog().item_ids

    def _windows(self, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """Return the inputs and the target items at each position, 0 where there is none; each [B, T]."""
        if not hasattr(self.net, "mask_item"):
            return batch.items, batch.targets
        items = torch.cat([batch.items[:, 1:], batch.targets[:, -1:]], 1)  # the last T of the T + 1 events
        is_item = items > 0
        masked = (uniform(batch.key, _MASKS, items.shape[1]) < self.mask_ratio) & is_item
        last_only = uniform(batch.key, _LAST_ONLY, 1) < self.mask_last_ratio  # [B, 1]
        last = torch.zeros_like(is_item)
        last[:, -1] = True
        masked = torch.where(last_only | ~masked.any(1, keepdim=True), last & is_item, masked)
        return items.masked_fill(masked, self.net.mask_item), items.masked_fill(~masked, 0)

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        targets, features = self._windows(batch)[1], self.features(batch)
        keys = DrawKeys.of(self.seed, self.trainer.global_step, batch.index, targets.shape[1])
        places = keys.positions.view(targets.shape)
        counted = targets > 0
        keys = DrawKeys(keys.step, places[counted])
        loss, count = self.loss(self.net, features[counted], targets[counted], keys)
        return {"loss": loss, "count": count}

    def score_block(self, batch: EvalBatch) -> ScoreBlock:
        return dot_products(self.features(batch), self.net.item_vectors(), self.net.item_bias)

    # SupportsRecommend: for `bigmodel recommend`.

    def recommend(
        self, history: Sequence[int | str], k: int = 10, times: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """Return the best items for a history, also of a new user.

        Args:
            history: ids of items as in the data, in chronological order. With `seen` `keep` the list may contain them; the
                input of the net is the last `max_length`.
            k: length of the list.
            times: of the history, in seconds since 1970, for a net that reads times; None: evenly spaced, by the median
                gap between two training events of a user (a line is printed).

        Returns:
            The best first, each with `item`, `title` (or None) and `score`.

        Raises:
            ValueError: for an item that is not in the data, an empty history, times that do not match it, or k above
                the number of items.
        """
        numbers = self._item_catalog().numbers(history)
        gap = self.median_gap
        if times is None and gap is not None:
            times = range(0, gap * len(numbers), gap) if gap else [0] * len(numbers)
            if getattr(self.net, "reads_times", False):
                say(
                    f"{type(self.net).__name__} reads times: without --times, items are assumed to be {gap:,} s apart, the"
                    " median of the training events"
                )
        return self.recommend_to(history_batch(numbers, times, self.net.max_length, self.device), k)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.median_gap is None and hasattr(self._data, "parts"):
            self.median_gap = self._data.median_gap()
        checkpoint["gap"] = self.median_gap

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.median_gap = checkpoint.get("gap")


class PairRecommendation(SequentialRecommendation):
    """Train a net of user and item vectors on single events; recommend only to users of the training data.

    With SquaredError it predicts ratings, and logs `val/rmse` and `val/mae` over all targets too.

    Args:
        net: factory of the net, called with `num_users` and `num_items`, taken from the data.
        loss: of the pairs: BPR (by default), BCE, SampledSoftmax, FullSoftmax; or of their ratings: SquaredError.
        optimizer: factory of the optimizer, called with parameter groups.
        schedule: learning rate schedule over the run's optimizer steps; null: constant.
        topk: lengths k of the evaluated lists.
        seed: with the optimizer step and the sample, determines the negatives.
        num_eval_negatives, seen: as in SequentialRecommendation.
    """

    count_unit = "samples"
    example_type = "pairs"

    def __init__(
        self,
        net: Callable[[int, int], nn.Module] = MatrixFactorization,
        loss: nn.Module | None = None,
        optimizer: optimizers.OptimizerFactory = torch.optim.AdamW,
        schedule: schedules.Schedule | None = None,
        topk: Sequence[int] = (5, 10, 20),
        seed: int = 0,
        num_eval_negatives: int | None = None,
        seen: Seen = "mask",
    ) -> None:
        make = _without_max_length(net)
        loss = loss if loss is not None else BPR()
        super().__init__(
            make, loss, optimizer, schedule, topk, seed=seed, num_eval_negatives=num_eval_negatives, seen=seen
        )

    def configure_model(self) -> None:
        if self.net is not None:
            return
        super().configure_model()
        if isinstance(self.loss, SquaredError):
            if not hasattr(self.net, "ratings"):
                raise ValueError(
                    f"--model.loss SquaredError: {type(self.net).__name__} does not predict ratings: set --model.net"
                    " bigmodel.nn.MatrixFactorization"
                )
            if hasattr(self._data, "parts"):  # else the mean is in the checkpoint
                self.loss.mean.fill_(self._data.mean_rating())

    def features(self, batch: Any) -> Tensor:
        """Return the vectors of the users [B, D]."""
        features: Tensor = self.net.features(batch.users)
        return features

    def targets(self, batch: Any) -> Tensor:
        """Return the target items [B]; -100 where there is none."""
        targets = batch.items if isinstance(batch, PairBatch) else batch.targets[:, 0]
        return targets.masked_fill((targets == 0) | (batch.weight == 0), IGNORE_INDEX)

    def training_step(self, batch: PairBatch) -> dict[str, Tensor]:
        if isinstance(self.loss, SquaredError):
            loss, count = self.loss(self.net, batch.users, batch.items, batch.ratings)
            return {"loss": loss, "count": count}
        keys = DrawKeys.of(self.seed, self.trainer.global_step, batch.index)
        loss, count = self.loss(self.net, self.features(batch), batch.items, keys)
        return {"loss": loss, "count": count}

    def predicted_ratings(self, batch: EvalBatch) -> Tensor | None:
        if not isinstance(self.loss, SquaredError):
            return None
        return self.loss.predict(self.net, batch.users, batch.targets)

    # User numbers have the same meaning as in training only if the data are the same.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["users"] = self._data.prepared.fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        data = self._data
        if data is not None and data.prepared.fingerprint != checkpoint["users"]:
            raise ValueError(
                f"--data.path {data.path} with these settings has other users than the training data, and the input of"
                f" {type(self).__name__} is user numbers: set --model SequentialRecommendation"
            )

    def recommend(
        self, history: Sequence[int | str], k: int = 10, times: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        raise ValueError(
            f"{type(self).__name__} recommends only to users of the training data (--user), not by a history: set --model"
            " SequentialRecommendation"
        )


def _without_max_length(net: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def make(max_length: int, **known: int) -> nn.Module:
        return net(**known)

    return make


def history_batch(numbers: Tensor, times: Sequence[int] | None, max_length: int, device: torch.device) -> EvalBatch:
    """Return a batch of one history [H] of item numbers; times None: unknown.

    Raises:
        ValueError: for an empty history, or times that differ in number, are not whole seconds or are not ascending.
    """
    if not len(numbers):
        raise ValueError("the history is empty: it must have at least one item")
    history = numbers.to(device)[None]
    stamps = None
    if times is not None:
        if len(times) != len(numbers):
            raise ValueError(f"{len(times)} times for a history of {len(numbers)} items: must be one for each")
        seconds = np.asarray(times)
        if seconds.dtype.kind not in "iu" or not 0 <= seconds.min() <= seconds.max() < _MAX_SECONDS:
            raise ValueError(f"times {list(times)}: must be whole seconds since 1970, from 0 to below {_MAX_SECONDS:,}")
        if (back := np.flatnonzero(np.diff(seconds) < 0)).size:
            raise ValueError(
                f"time {seconds[back[0] + 1]} is after {seconds[back[0]]} in the list: the history must be in chronological"
                " order"
            )
        stamps = torch.from_numpy(seconds.astype(np.int64)).to(device)[None, -max_length:]
    none = torch.zeros(1, 0, dtype=torch.int64, device=device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    return EvalBatch(zero, history[:, -max_length:], stamps, history, none, None, zero, torch.ones(1, device=device))
