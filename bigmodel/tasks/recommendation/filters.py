"""Filters of events: by rating, repeated events, number of events of users and items, and age.

N events.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np


@dataclass
class Filters:
    """Rules that exclude events before items are numbered and splits are made; applied in this order.

    Args:
        min_rating: events with a lower rating are excluded; by default none.
        keep_duplicates: of the events of a user with the same item, the `first`, the `last`, or `all`.
        min_user_events: users with fewer events are excluded; repeated with the next until both are satisfied (k-core).
        min_item_events: items with fewer events are excluded.
        max_history: maximum number of events of each user, the latest; by default all.
    """

    min_rating: float | None = None
    keep_duplicates: Literal["first", "last", "all"] = "all"
    min_user_events: int = 1
    min_item_events: int = 1
    max_history: int | None = None

    def __post_init__(self) -> None:
        if self.keep_duplicates not in ("first", "last", "all"):
            raise ValueError(f"--data.filters.keep_duplicates {self.keep_duplicates}: must be first, last or all")
        for name in ("min_user_events", "min_item_events", "max_history"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--data.filters.{name} {value}: must be at least 1")

    def settings(self) -> dict[str, Any]:
        """Return the settings for the key of the prepared folder."""
        return asdict(self)

    def apply(self, users: np.ndarray, items: np.ndarray, ratings: np.ndarray | None) -> tuple[np.ndarray, list[str]]:
        """Apply the rules.

        Args:
            users: [N] int, ascending.
            items: [N] int, from 0; in chronological order for each user.
            ratings: [N] float32, or None.

        Returns:
            The indices of the remaining events, ascending, int64; and a line about the events excluded by each rule.

        Raises:
            ValueError: if `min_rating` is set and there are no ratings, or no event remains.
        """
        kept, lines = np.arange(len(users)), []

        def select(which: np.ndarray, excluded: str) -> None:
            nonlocal kept
            if len(which) < len(kept):
                lines.append(f"excluded {len(kept) - len(which):,} of {len(kept):,} events: {excluded}")
                kept = kept[which]

        if self.min_rating is not None:
            if ratings is None:
                raise ValueError(
                    f"--data.filters.min_rating {self.min_rating}: the data have no ratings; set --data.rating_column"
                )
            select(np.flatnonzero(ratings >= self.min_rating), f"rated below {self.min_rating:g} (min_rating)")
        if self.keep_duplicates != "all":
            duplicates = f"duplicates of user and item (keep_duplicates: {self.keep_duplicates})"
            select(_drop_duplicates(users[kept], items[kept], self.keep_duplicates), duplicates)
        if self.min_user_events > 1 or self.min_item_events > 1:
            which, num_rounds = _core(users[kept], items[kept], self.min_user_events, self.min_item_events)
            few_users, few_items = (
                len(np.unique(numbers[kept])) - len(np.unique(numbers[kept[which]])) for numbers in (users, items)
            )
            limits = f"min_user_events {self.min_user_events:,}, min_item_events {self.min_item_events:,}"
            select(
                which,
                f"those of {few_users:,} users and {few_items:,} items with fewer ({limits}; rounds: {num_rounds})",
            )
        if self.max_history is not None:
            which = _latest(users[kept], self.max_history)
            select(which, f"older than a user's last {self.max_history:,} (max_history)")
        if len(kept) == 0:
            raise ValueError(f"--data.filters exclude all events ({'; '.join(lines)}): set weaker ones")
        return kept, lines


def _drop_duplicates(users: np.ndarray, items: np.ndarray, keep: str) -> np.ndarray:
    """Return the index of the first or last event of each pair of user and item, ascending."""
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
