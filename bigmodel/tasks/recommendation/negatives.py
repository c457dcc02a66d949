"""Negative sampling of items on the device, as a function of (seed, optimizer step, sample) only.

The draws of a step are the same on any number of processes, in micro-batches of any size, and after a resume, because a
sample is in the same step in all of them. A task creates `DrawKeys` in each step, without synchronisation::

    keys = DrawKeys.of(seed, self.trainer.global_step, batch.index, num_positions)

B sequences of T positions, M positions (or pairs), n negatives, I items.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bigmodel.data.stateless_rng import random_bits, sample_keys, uniform
from bigmodel.nn.accumulation import accumulable
from bigmodel.tasks.recommendation.ranking import top_k

_POSITIONS, _NEGATIVES, _EVALUATION = 1, 2, 1 << 32  # streams; of the last, one for each chunk of items
_CHUNK = 8192
_NO_SAMPLE = -1
_POSITIVE = (1 << 63) - 1


class DrawKeys(NamedTuple):
    """Keys of random numbers.

    Attributes:
        step: [1] int64, for draws that all samples of an optimizer step share.
        positions: [B, T] or [M] int64, one for each position.
    """

    step: Tensor
    positions: Tensor

    @classmethod
    def of(cls, seed: int, step: int, index: Tensor, num_positions: int = 1) -> DrawKeys:
        """Return the keys of a micro-batch: positions [B, T], or [B] if T is 1.

        Args:
            seed: of the run.
            step: optimizer steps taken, the same in each micro-batch of a step.
            index: [B], number of each sample.
            num_positions: T.
        """
        shared = int(sample_keys(seed, step, np.array([_NO_SAMPLE]))[0])
        keys = random_bits(sample_keys(seed, step, index), _POSITIONS, num_positions)
        # Filled on the device: a copy would need a synchronisation.
        return cls(torch.full((1,), shared, device=index.device), keys if num_positions > 1 else keys[:, 0])


class Negatives(nn.Module):
    """Draw items with replacement, uniformly or by popularity.

    No item is excluded: the caller masks negatives that are also the target.

    Args:
        num_items: I.
        counts: training events of each item, [I + 1] (0 of padding), to draw in proportion to, so that an item without
            events is never drawn; None: uniformly.

    Raises:
        ValueError: for counts of another shape, negative ones, or only zeros.
    """

    def __init__(self, num_items: int, counts: Tensor | None = None) -> None:
        super().__init__()
        self.num_items = self.total = num_items
        upper = log_shares = None
        if counts is not None:
            counts = check_counts(counts, num_items)[1:]
            self.total = int(counts.sum())
            upper, log_shares = counts.cumsum(0), (accumulable(counts) / self.total).log().float()
        # Cumulative counts, and logarithms of the shares [I]; not weights, so not in checkpoints.
        self.upper: Tensor | None
        self.log_shares: Tensor
        self.register_buffer("upper", upper, persistent=False)
        self.register_buffer("log_shares", log_shares, persistent=False)

    def draw(self, keys: Tensor, num_negatives: int) -> Tensor:
        """Draw items [M, n] int64 from keys [M]; a row depends on its key alone."""
        # Of 63 bits: the remainders are biased by less than 1e-9 for any total below 2^33.
        numbers = (random_bits(keys, _NEGATIVES, num_negatives) & _POSITIVE) % self.total
        return 1 + (numbers if self.upper is None else torch.searchsorted(self.upper, numbers, right=True))

    def log_probability(self, items: Tensor) -> Tensor:
        """Return the log-probability of each item in a draw, float32, of the items' shape; -inf for those never drawn."""
        if self.upper is None:
            return torch.full(items.shape, -math.log(self.num_items), device=items.device)
        return self.log_shares[items - 1]


def evaluation_negatives(
    seed: int, users: Tensor, num_items: int, num_negatives: int, excluded: Tensor, counts: Tensor | None = None
) -> Tensor:
    """Draw the negatives of sampled metrics: without replacement, the same for a user in any batch.

    Each item that is not excluded gets a random number u, and the items with the highest u are drawn; by popularity, with
    the highest log(u) / count, which draws in proportion to counts without replacement (Efraimidis and Spirakis 2006).

    Args:
        seed: of the evaluation, the same throughout a run.
        users: [B], number of each user.
        num_items: I.
        num_negatives: n, at most I.
        excluded: [B, E] int64, history and targets, padded with 0.
        counts: training events of each item [I + 1], to draw in proportion to; None: uniformly.

    Returns:
        [B, n] int64, 0 at the end where fewer items remain.

    Raises:
        ValueError: for more negatives than items, or counts as in `Negatives`.
    """
    if not 1 <= num_negatives <= num_items:
        raise ValueError(f"{num_negatives} negatives of {num_items} items: must be in 1 to {num_items}")
    keys = sample_keys(seed, 0, users)
    if counts is not None:
        counts = check_counts(counts, num_items).to(users.device)

    def score_block(first: int, last: int) -> Tensor:
        u = uniform(keys, _EVALUATION + first // _CHUNK, last - first)  # [B, W]
        # -inf excludes items without events.
        return u if counts is None else u.clamp(min=2.0**-25).log() / counts[first:last]

    return top_k(score_block, num_items, num_negatives, excluded, block_size=_CHUNK)[0]


def check_counts(counts: Tensor, num_items: int) -> Tensor:
    """Return counts of items [I + 1] as int64.

    Raises:
        ValueError: for another shape, negative counts, or only zeros.
    """
    if counts.shape != (num_items + 1,):
        raise ValueError(
            f"counts of items have shape {list(counts.shape)}, but {num_items} items need [{num_items + 1}]"
        )
    if counts.is_floating_point() or int(counts.min()) < 0 or int(counts[1:].sum()) == 0:
        raise ValueError("counts of items must be whole numbers, none negative, and not all 0")
    return counts.long()
