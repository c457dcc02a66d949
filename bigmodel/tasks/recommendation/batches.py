"""Batches of this task, and the datasets that build them from flat arrays, without loops over rows.

B rows, T positions of a window, H events of the longest history in a batch, K of the most targets, I items, U users.
Items are numbered from 1; 0 is padding, on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bigmodel.data.stateless_rng import sample_keys
from bigmodel.tasks.recommendation.interactions import Interactions
from bigmodel.tasks.recommendation.splits import SplitInteractions


class SequenceBatch(NamedTuple):
    """Windows of users' training events, for prediction of each next item.

    Attributes:
        items: [B, T] int64.
        targets: [B, T] int64, the item after each; 0 where `items` is.
        times: [B, T] int64, seconds since 1970, 0 at padding; None if the data have no times.
        users: [B] int64.
        index: [B] int64, number of the window.
        weight: [B] float32, 0 for padding rows.
        key: [B] int64, key of all random draws of a sample (negatives, masks), see `data.stateless_rng`.
    """

    items: Tensor
    targets: Tensor
    times: Tensor | None
    users: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    weight: Tensor
    key: Tensor


class PairBatch(NamedTuple):
    """Single training events.

    Attributes:
        users: [B] int64.
        items: [B] int64.
        ratings: [B] float32; None if the data have no ratings.
        index: [B] int64, number of the training event.
        weight: [B] float32, 0 for padding rows.
        key: [B] int64, key of all random draws of a sample (negatives, masks), see `data.stateless_rng`.
    """

    users: Tensor
    items: Tensor
    ratings: Tensor | None
    index: Tensor  # type: ignore[assignment]
    weight: Tensor
    key: Tensor


class UserBatch(NamedTuple):
    """Users with all their training events.

    Attributes:
        users: [B] int64.
        items: [B, H] int64.
        ratings: [B, H] float32, 0 at padding; None if the data have no ratings.
        index: [B] int64, number of the user among those with training events.
        weight: [B] float32, 0 for padding rows.
        key: [B] int64, key of all random draws of a sample (negatives, masks), see `data.stateless_rng`.
    """

    users: Tensor
    items: Tensor
    ratings: Tensor | None
    index: Tensor  # type: ignore[assignment]
    weight: Tensor
    key: Tensor


class EvalBatch(NamedTuple):
    """Users with their histories and targets.

    Attributes:
        users: [B] int64.
        items: [B, T] int64, the last T items of the history, the input of a net.
        times: [B, T] int64, seconds since 1970, 0 at padding; None if the data have no times.
        history: [B, H] int64, the whole history, which is excluded from recommendations.
        targets: [B, K] int64; K is 0 in prediction.
        ratings: [B, K] float32, of the targets, 0 at padding; None if the data have no ratings.
        index: [B] int64, number of the user among the evaluated users.
        weight: [B] float32, 0 for padding rows.
        history_ratings: [B, H] float32, of the history, 0 at padding; None if the data have no ratings.
    """

    users: Tensor
    items: Tensor
    times: Tensor | None
    history: Tensor
    targets: Tensor
    ratings: Tensor | None
    index: Tensor  # type: ignore[assignment]
    weight: Tensor
    history_ratings: Tensor | None = None


def pad_left(array: np.ndarray, starts: np.ndarray, stops: np.ndarray, width: int | None = None) -> np.ndarray:
    """Return the last `width` values of each range of a flat array, left-padded with 0.

    Args:
        array: [N].
        starts: [B], starts of the ranges.
        stops: [B], ends of the ranges.
        width: by default the length of the longest.

    Returns:
        [B, width], of the array's type.
    """
    if width is None:
        width = int((stops - starts).max(initial=0))
    numbers = stops[:, None] - np.arange(width, 0, -1)  # [B, width]
    inside = numbers >= starts[:, None]
    return np.where(inside, array[np.where(inside, numbers, 0)], array.dtype.type(0))


def _tensor(array: np.ndarray | None, dtype: torch.dtype = torch.int64) -> Any:
    return None if array is None else torch.from_numpy(array).to(dtype)


class SequenceDataset(Dataset[SequenceBatch]):
    """Windows of T + 1 training events of each user, counted from the user's last event.

    A window begins `stride` events after the previous one. With a stride of T, each event except a user's first is a
    target once; with a smaller stride several times, each time with a longer history. The first window of a user may be
    shorter. A user with fewer than two events has no window.

    Args:
        parts: the split events.
        max_length: T.
        stride: 1 to T.
        seed: with epoch and sample, determines a sample's key.
    """

    def __init__(self, parts: SplitInteractions, max_length: int, stride: int, seed: int) -> None:
        self.events, self.max_length, self.stride, self.seed = parts.events, max_length, stride, seed
        self.starts, self.stops = parts.bounds("train")
        num_targets = self.stops - self.starts - 1
        # ceil((events after a first window of T targets) / stride)
        counts = np.where(num_targets > 0, 1 - np.minimum(max_length - num_targets, 0) // stride, 0)
        self._last = np.cumsum(counts)  # [U], one past the last window of each user

    def __len__(self) -> int:
        return int(self._last[-1])

    def __getitem__(self, number: int) -> SequenceBatch:
        """Return one window, without the batch dimension."""
        return SequenceBatch(*_first_rows(self.__getitems__([number])))

    def __getitems__(self, numbers: Sequence[int], epoch: int = 0) -> SequenceBatch:
        """Return the windows of these numbers, in an epoch, as one batch."""
        index = np.asarray(numbers, np.int64)
        users = np.searchsorted(self._last, index, side="right")
        stops = (
            self.stops[users] - (self._last[users] - 1 - index) * self.stride
        )  # a user's windows in chronological order
        starts = self.starts[users]
        T = self.max_length
        items = pad_left(self.events.items, starts, stops, T + 1)
        targets = np.where(items[:, :-1] > 0, items[:, 1:], 0)
        times = self.events.times
        return SequenceBatch(
            _tensor(items[:, :-1]),
            _tensor(targets),
            None if times is None else _tensor(pad_left(times, starts, stops, T + 1)[:, :-1]),
            _tensor(users),
            _tensor(index),
            torch.ones(len(index)),
            _tensor(sample_keys(self.seed, epoch, index)),
        )


class PairDataset(Dataset[PairBatch]):
    """Single training events, grouped by user.

    Args:
        parts: the split events.
        seed: with epoch and sample, determines a sample's key.
    """

    def __init__(self, parts: SplitInteractions, seed: int) -> None:
        self.events, self.seed = parts.events, seed
        starts, stops = parts.bounds("train")
        self._last = np.cumsum(stops - starts)  # [U], one past the last training event of each user
        self._shift = stops - self._last  # [U], from the number of a training event to that of the event

    def __len__(self) -> int:
        return int(self._last[-1])

    def __getitem__(self, number: int) -> PairBatch:
        """Return one event, without the batch dimension."""
        return PairBatch(*_first_rows(self.__getitems__([number])))

    def __getitems__(self, numbers: Sequence[int], epoch: int = 0) -> PairBatch:
        """Return the events of these numbers, in an epoch, as one batch."""
        index = np.asarray(numbers, np.int64)
        users = np.searchsorted(self._last, index, side="right")
        events = index + self._shift[users]
        ratings = self.events.ratings
        return PairBatch(
            _tensor(users),
            _tensor(self.events.items[events]),
            None if ratings is None else _tensor(ratings[events], torch.float32),
            _tensor(index),
            torch.ones(len(index)),
            _tensor(sample_keys(self.seed, epoch, index)),
        )


class UserDataset(Dataset[UserBatch]):
    """Users with all their training events; users without training events are excluded.

    Args:
        parts: the split events.
        seed: with epoch and sample, determines a sample's key.
    """

    def __init__(self, parts: SplitInteractions, seed: int) -> None:
        self.events, self.seed = parts.events, seed
        self.starts, self.stops = parts.bounds("train")
        self.users = np.flatnonzero(self.stops > self.starts)

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, number: int) -> UserBatch:
        """Return one user, without the batch dimension."""
        return UserBatch(*_first_rows(self.__getitems__([number])))

    def __getitems__(self, numbers: Sequence[int], epoch: int = 0) -> UserBatch:
        """Return the users of these numbers, in an epoch, as one batch."""
        index = np.asarray(numbers, np.int64)
        users = self.users[index]
        starts, stops = self.starts[users], self.stops[users]
        ratings = self.events.ratings
        return UserBatch(
            _tensor(users),
            _tensor(pad_left(self.events.items, starts, stops)),
            None if ratings is None else _tensor(pad_left(ratings, starts, stops), torch.float32),
            _tensor(index),
            torch.ones(len(users)),
            _tensor(sample_keys(self.seed, epoch, index)),
        )


class HistoryDataset(Dataset[EvalBatch]):
    """Users with their histories and targets.

    Args:
        events: all of them.
        users: [n], numbers of the evaluated users.
        starts: [U], start of the targets of each user; the history is before it.
        stops: [U], end of the targets of each user.
        max_length: T.
    """

    def __init__(
        self, events: Interactions, users: np.ndarray, starts: np.ndarray, stops: np.ndarray, max_length: int
    ) -> None:
        self.events, self.users, self.starts, self.stops = events, users, starts, stops
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, number: int) -> EvalBatch:
        """Return one user, without the batch dimension."""
        return EvalBatch(*_first_rows(self.__getitems__([number])))

    def __getitems__(self, numbers: Sequence[int]) -> EvalBatch:
        """Return the users of these numbers, as one batch."""
        users = self.users[np.asarray(numbers, np.int64)]
        firsts, starts, stops = self.events.offsets[users], self.starts[users], self.stops[users]
        events, T = self.events, self.max_length
        history_ratings, target_ratings = (
            None if events.ratings is None else _tensor(pad_left(events.ratings, *part), torch.float32)
            for part in ((firsts, starts), (starts, stops))
        )
        return EvalBatch(
            _tensor(users),
            _tensor(pad_left(events.items, firsts, starts, T)),
            None if events.times is None else _tensor(pad_left(events.times, firsts, starts, T)),
            _tensor(pad_left(events.items, firsts, starts)),
            _tensor(pad_left(events.items, starts, stops)),
            target_ratings,
            torch.tensor(numbers),
            torch.ones(len(users)),
            history_ratings,
        )


def _first_rows(batch: tuple[Tensor | None, ...]) -> list[Any]:
    return [None if field is None else field[0] for field in batch]
