"""Filters of events: by rating, repeated events, number of events of users and items, and age.

N events.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np


@dataclass
class Filters:
    """Rules for events to leave out, before items are numbered and splits are made; applied in this order.

    Args:
        min_rating: events with a lower rating are left out; by default none are.
        keep: of several events of the same user with the same item, the `first` or the `last`, or `all` of them.
        min_user_events: users with fewer events are left out; together with the next until both hold (k-core).
        min_item_events: items with fewer events are left out.
        max_history: number of latest events of each user to keep; by default all.
    """

    min_rating: float | None = None
    keep: Literal["first", "last", "all"] = "all"
    min_user_events: int = 1
    min_item_events: int = 1
    max_history: int | None = None

    def __post_init__(self) -> None:
        if self.keep not in ("first", "last", "all"):
            raise ValueError(f"--data.filters.keep {self.keep}: first, last or all is accepted")
        for name in ("min_user_events", "min_item_events", "max_history"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--data.filters.{name} {value}: at least 1 is accepted; leave it out to keep all")

    def settings(self) -> dict[str, Any]:
        """Settings for the key of the prepared folder."""
        return asdict(self)

    def kept(self, users: np.ndarray, items: np.ndarray, ratings: np.ndarray | None) -> tuple[np.ndarray, list[str]]:
        """Return the numbers of the kept events, and a line about each kind that was left out.

        Args:
            users: [N] int, ascending.
            items: [N] int, from 0; in chronological order for each user.
            ratings: [N] float32, or None.

        Returns:
            The numbers of the events that are kept, ascending, int64.

        Raises:
            ValueError: if `min_rating` is set and there are no ratings, or nothing is kept.
        """
        kept, lines = np.arange(len(users)), []

        def narrow(which: np.ndarray, what: str) -> None:
            nonlocal kept
            if len(which) < len(kept):
                lines.append(f"left out {len(kept) - len(which):,} of {len(kept):,} events: {what}")
                kept = kept[which]

        if self.min_rating is not None:
            if ratings is None:
                raise ValueError(
                    f"--data.filters.min_rating {self.min_rating}: the data have no ratings; set --data.rating_column"
                )
            narrow(np.flatnonzero(ratings >= self.min_rating), f"rated below {self.min_rating:g} (min_rating)")
        if self.keep != "all":
            again = f"a user's further ones with the same item (keep: {self.keep})"
            narrow(_one_of_each(users[kept], items[kept], self.keep), again)
        if self.min_user_events > 1 or self.min_item_events > 1:
            which, num_rounds = _core(users[kept], items[kept], self.min_user_events, self.min_item_events)
            few_users, few_items = (
                len(np.unique(numbers[kept])) - len(np.unique(numbers[kept[which]])) for numbers in (users, items)
            )
            limits = f"min_user_events {self.min_user_events:,}, min_item_events {self.min_item_events:,}"
            narrow(
                which,
                f"those of {few_users:,} users and {few_items:,} items that have too few ({limits}; rounds: {num_rounds:,})",
            )
        if self.max_history is not None:
            which = _latest(users[kept], self.max_history)
            narrow(which, f"older than a user's last {self.max_history:,} (max_history)")
        if len(kept) == 0:
            raise ValueError(f"--data.filters leave no event; loosen them ({'; '.join(lines)})")
        return kept, lines


def _one_of_each(users: np.ndarray, items: np.ndarray, keep: str) -> np.ndarray:
    """Return the first or last event of each pair, ascending."""
    pairs = users.astype(np.int64) * (int(items.max(initial=0)) + 1) + items
    if keep == "first":
        return np.sort(np.unique(pairs, return_index=True)[1])
    return np.sort(len(pairs) - 1 - np.unique(pairs[::-1], return_index=True)[1])


def _core(users: np.ndarray, items: np.ndarray, min_user: int, min_item: int) -> tuple[np.ndarray, int]:
    """Return the largest set of events in which each user has `min_user` and each item `min_item`, and the number of
    rounds.
    """
    kept, num_rounds = np.arange(len(users)), 0
    while True:
        enough = (np.bincount(users) >= min_user)[users] & (np.bincount(items) >= min_item)[items]
        if enough.all():
            return kept, num_rounds
        kept, users, items = kept[enough], users[enough], items[enough]
        num_rounds += 1


def _latest(users: np.ndarray, count: int) -> np.ndarray:
    """Return the last `count` events of each user, of users in ascending order."""
    stops = np.searchsorted(users, users, side="right")
    return np.flatnonzero(np.arange(len(users)) >= stops - count)
