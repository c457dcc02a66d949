"""Splits of each user's events into training, validation and test.

The events of a user are stored in the order training, validation, test, so that two numbers per user define a split::

    offsets[u] .. train_stops[u] .. val_stops[u] .. offsets[u + 1]

The history of a target is the events before its split: for validation the training events, for test the training and
validation events.

N events, U users.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from bigmodel.data.split_shares import check_shares
from bigmodel.data.stateless_rng import sample_keys
from bigmodel.tasks.recommendation.interactions import Interactions, ranges


@dataclass(frozen=True)
class SplitInteractions:
    """Events split into train, val and test.

    Attributes:
        events: all of them, each user's in the order train, val, test.
        train_stops: [U] int64, where the training events of each user end.
        val_stops: [U] int64, where the validation events end and the test events begin.
        line: readable summary.
    """

    events: Interactions
    train_stops: np.ndarray
    val_stops: np.ndarray
    line: str

    def bounds(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Return start and stop of the events of each user in a split (train, val, test), [U] int64 each."""
        starts, stops = self.events.offsets[:-1], self.events.offsets[1:]
        return {
            "train": (starts, self.train_stops),
            "val": (self.train_stops, self.val_stops),
            "test": (self.val_stops, stops),
        }[split]

    def event_indices(self, split: str) -> np.ndarray:
        """Return the indices [n] int64 of the events of a split, ascending."""
        return ranges(*self.bounds(split))

    def users_to_evaluate(self, split: str) -> np.ndarray:
        """Return the users [n] int64 with targets in a split and a history."""
        starts, stops = self.bounds(split)
        return np.flatnonzero((stops > starts) & (starts > self.events.offsets[:-1]))

    def repeats(self, split: str) -> tuple[int, int, int]:
        """Return the number of different targets of users to evaluate, of repeats within the split, and of the different
        ones that are in the history.
        """
        users = self.users_to_evaluate(split)
        starts, stops = (bounds[users] for bounds in self.bounds(split))
        targets, history = (
            np.repeat(users, last - first) * (self.events.num_items + 1) + self.events.items[ranges(first, last)]
            for first, last in ((starts, stops), (self.events.offsets[users], starts))
        )
        different = np.unique(targets)
        place = np.minimum(np.searchsorted(different, history), len(different) - 1)
        seen = np.zeros(len(different), bool)
        seen[place[different[place] == history]] = True
        return len(different), len(targets) - len(different), int(seen.sum())


class InteractionSplit(ABC):
    """Base class of splits. Its `repr` must contain all settings, as that of a dataclass."""

    def split(self, events: Interactions) -> SplitInteractions:
        """Split the events.

        Raises:
            ValueError: if there is no training event, or a requested split has no user to evaluate.
        """
        parts = self._split(events)
        counts = {name: int(np.subtract(*parts.bounds(name)[::-1]).sum()) for name in ("train", "val", "test")}
        if counts["train"] == 0:
            raise ValueError(
                f"--data.split leaves no training events ({parts.line}): set --data.path to more data, or another split"
            )
        for name in self.requested:
            if len(parts.users_to_evaluate(name)) == 0:
                raise ValueError(
                    f"--data.split leaves no users to evaluate in {name}: none has an event there and an earlier one"
                    f" ({parts.line}): set --data.path to more data, or another split"
                )
        not_evaluated = {
            name: int(np.count_nonzero(np.subtract(*parts.bounds(name)[::-1]))) - len(parts.users_to_evaluate(name))
            for name in self.requested
        }
        shown_users = ", ".join(f"{count:,} in {name}" for name, count in not_evaluated.items() if count)
        note = f"; users without earlier events are not evaluated: {shown_users}" if shown_users else ""
        shown = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        return SplitInteractions(
            parts.events, parts.train_stops, parts.val_stops, f"events: {shown} ({parts.line}){note}"
        )

    @property
    def requested(self) -> tuple[str, ...]:
        """Names of the splits other than train."""
        return ("val", "test")

    @abstractmethod
    def _split(self, events: Interactions) -> SplitInteractions:
        """Split the events, without checks."""


@dataclass(frozen=True)
class LeaveOneOut(InteractionSplit):
    """The last event of each user is for test, the one before for validation, the others for training (Kang and McAuley
    2018, and most later papers).

    All events of users with fewer than `min_events` are for training; these users are not evaluated.

    Args:
        min_events: at least 3.
    """

    min_events: int = 3

    def __post_init__(self) -> None:
        if self.min_events < 3:
            raise ValueError(
                f"--data.split.min_events {self.min_events}: must be at least 3 (training, validation, test)"
            )

    def _split(self, events: Interactions) -> SplitInteractions:
        stops, enough = events.offsets[1:], events.lengths >= self.min_events
        few = int(np.count_nonzero(~enough))
        line = f"leave one out; {few:,} users with fewer than {self.min_events} events are in train only"
        return SplitInteractions(events, stops - 2 * enough, stops - enough, line)


@dataclass(frozen=True)
class GlobalTime(InteractionSplit):
    """Split by time, as in production: validation starts at one instant, test at a later one.

    All training events are earlier than all validation events, and these than all test events. A user may have several
    targets, or none; a user without earlier events is not evaluated.

    Args:
        val: share of the events, 0 for no such split (events of equal time are in the same split); or the first instant,
            in ISO format (UTC by default).
        test: likewise.
    """

    val: float | str = 0.1
    test: float | str = 0.1

    def __post_init__(self) -> None:
        instants = [isinstance(value, str) for value in (self.val, self.test)]
        for name, value in (("val", self.val), ("test", self.test)):
            if isinstance(value, str):
                _instant(name, value)
        if not any(instants):
            check_shares(float(self.val), float(self.test))
        elif not all(instants):
            raise ValueError(
                f"--data.split.val {self.val}, --data.split.test {self.test}: both must be shares, or both instants"
            )
        elif _instant("val", str(self.val)) >= _instant("test", str(self.test)):
            raise ValueError(f"--data.split.val {self.val} must be before --data.split.test {self.test}")

    @property
    def requested(self) -> tuple[str, ...]:
        return tuple(name for name, value in (("val", self.val), ("test", self.test)) if value)

    def _split(self, events: Interactions) -> SplitInteractions:
        if events.times is None:
            raise ValueError(
                "--data.split GlobalTime: the data have no times; set --data.time_column, or another split"
            )
        times = np.asarray(events.times)
        if isinstance(self.val, str) or isinstance(self.test, str):
            val, test = _instant("val", str(self.val)), _instant("test", str(self.test))
        else:
            val, test = (_share_from(times, share) for share in (self.val + self.test, self.test))
        train_stops, val_stops = (_first_from(events.offsets, times, instant) for instant in (val, test))
        days = [datetime.fromtimestamp(min(t, int(times.max()) + 1), UTC).isoformat() for t in (val, test)]
        return SplitInteractions(events, train_stops, val_stops, f"val from {days[0]} on, test from {days[1]} on")


@dataclass(frozen=True)
class Ratio(InteractionSplit):
    """Split each user's events by shares: the last for test, those before for validation; or randomly.

    Counts are rounded to the nearest; each user has at least one training event. In a random split, later events may be
    used to predict earlier ones: for models that ignore the order.

    Args:
        val: share of each user's events for validation, at least 0 (no such split) and below 1.
        test: share for test, likewise.
        random: choose events randomly.
        seed: with the event's number, determines the random split.
    """

    val: float = 0.1
    test: float = 0.1
    random: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_shares(self.val, self.test)

    @property
    def requested(self) -> tuple[str, ...]:
        return tuple(name for name, value in (("val", self.val), ("test", self.test)) if value)

    def _split(self, events: Interactions) -> SplitInteractions:
        lengths = events.lengths
        num_test = np.minimum((lengths * self.test + 0.5).astype(np.int64), np.maximum(lengths - 1, 0))
        num_val = np.minimum((lengths * self.val + 0.5).astype(np.int64), np.maximum(lengths - num_test - 1, 0))
        val_stops = events.offsets[1:] - num_test
        train_stops = val_stops - num_val
        if not self.random:
            return SplitInteractions(
                events, train_stops, val_stops, f"each user's last {self.test:g} for test, {self.val:g} for val"
            )
        users = np.repeat(np.arange(events.num_users), lengths)
        drawn = np.lexsort((sample_keys(self.seed, 0, np.arange(len(events))), users))  # shuffled within each user
        split = np.empty(len(events), np.int8)
        split[drawn] = np.repeat(
            np.tile(np.arange(3, dtype=np.int8), events.num_users),
            np.stack([lengths - num_val - num_test, num_val, num_test], 1).ravel(),
        )
        order = np.lexsort((split, users))  # stable: the order of time within a split
        line = f"{self.test:g} of each user's for test, {self.val:g} for val, drawn with seed {self.seed}"
        return SplitInteractions(events.reordered(order), train_stops, val_stops, line)


@dataclass(frozen=True)
class ByFile(InteractionSplit):
    """The splits of files named by split.

    Args:
        names: of the splits other than train that there are.
    """

    names: tuple[str, ...] = ("val", "test")

    @property
    def requested(self) -> tuple[str, ...]:
        return self.names

    def _split(self, events: Interactions) -> SplitInteractions:
        splits = events.splits
        assert splits is not None
        users = np.repeat(np.arange(events.num_users), events.lengths)
        order = np.lexsort((splits, users))  # stable: the order of time within a split
        counts = [np.bincount(users[splits == i], minlength=events.num_users) for i in range(2)]
        train_stops = events.offsets[:-1] + counts[0]
        return SplitInteractions(
            events.reordered(order), train_stops, train_stops + counts[1], "by the names of the files"
        )


def _instant(name: str, text: str) -> int:
    """Return seconds since 1970."""
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"--data.split.{name} {text!r}: must be a share, or an instant in ISO format, such as 2016-07-01"
        ) from None
    return int((instant if instant.tzinfo else instant.replace(tzinfo=UTC)).timestamp())


def _share_from(times: np.ndarray, share: float) -> int:
    """Return the instant [s] at which the last events of this share start, including all events of equal time."""
    if share == 0:
        return int(np.iinfo(np.int64).max)
    place = min(len(times) - round(len(times) * share), len(times) - 1)
    return int(np.partition(times, place)[place])


def _first_from(offsets: np.ndarray, times: np.ndarray, instant: int) -> np.ndarray:
    """Return [U] int64, the first event of each user at this instant or later, or the end of the user's events."""
    before = np.concatenate([[0], np.cumsum(times < instant)])
    stops: np.ndarray = offsets[:-1] + before[offsets[1:]] - before[offsets[:-1]]
    return stops
