"""User-item events as flat arrays: grouped by user, in chronological order.

Items are numbered 1 to I (0 is padding), users 0 to U - 1.

N events, U users, I items.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True)
class Interactions:
    """Events of all users; the arrays may be memory-mapped.

    Attributes:
        offsets: [U + 1] int64; the events of user u are `offsets[u]` to `offsets[u + 1]`, in chronological order, those
            of equal time in the order of the source.
        items: [N] int32, 1 to I.
        times: [N] int64, whole seconds since 1970; None: the source has no times, and its order is used.
        ratings: [N] float32, or None.
        num_items: I, the largest item number.
        splits: [N] int8, 0 to 2 for train, val and test, of files named by split; or None.
    """

    offsets: np.ndarray
    items: np.ndarray
    times: np.ndarray | None
    ratings: np.ndarray | None
    num_items: int
    splits: np.ndarray | None = None

    @property
    def num_users(self) -> int:
        """Number of users U."""
        return len(self.offsets) - 1

    def __len__(self) -> int:
        return len(self.items)

    @property
    def lengths(self) -> np.ndarray:
        """Number of events of each user, [U] int64."""
        return np.diff(self.offsets)

    def reordered(self, order: np.ndarray) -> Interactions:
        """Return the events in another order [N], within each user."""
        return Interactions(
            self.offsets,
            self.items[order],
            None if self.times is None else self.times[order],
            None if self.ratings is None else self.ratings[order],
            self.num_items,
            None if self.splits is None else self.splits[order],
        )

    def renumbered(self, numbers: np.ndarray, num_items: int) -> Interactions:
        """Return the events with other item numbers; events of items without a new number are excluded.

        Args:
            numbers: [I + 1] int32, the new number of each item, or 0.
            num_items: the new I.
        """
        items = numbers[self.items]
        kept = np.flatnonzero(items)
        before = np.concatenate([[0], np.cumsum(items > 0)])
        return Interactions(
            before[self.offsets],
            items[kept],
            None if self.times is None else self.times[kept],
            None if self.ratings is None else self.ratings[kept],
            num_items,
            None if self.splits is None else self.splits[kept],
        )


def ranges(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Return the concatenation [sum of stops - starts] int64 of the ranges from `starts` [M] to `stops` [M]."""
    counts = stops - starts
    numbers = np.arange(counts.sum(), dtype=np.int64)
    numbers += np.repeat(starts - (np.cumsum(counts) - counts), counts)
    return numbers


class SparseMatrix(NamedTuple):
    """A matrix of users by items in compressed rows (CSR); `scipy.sparse.csr_array((values, indices, indptr), shape)`.

    Attributes:
        indptr: [U + 1] int64; row u is `indptr[u]` to `indptr[u + 1]` of the other two.
        indices: [n] int32, item numbers, ascending and each once in a row.
        values: [n] float32.
        shape: U, I + 1 (column 0 is padding, and empty).
    """

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    shape: tuple[int, int]


@dataclass(frozen=True)
class IdTable:
    """Ids of users or items in the source.

    Args:
        table: column `id` (int64 or string), ascending; for items also `title` and `genres` if the source has them.
        first: number of the first row.
        what: "user" or "item", for messages.
    """

    table: pa.Table
    first: int
    what: str

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @cached_property
    def _ids(self) -> pa.Array:
        return self.table.column("id").combine_chunks()

    def equals(self, ids: Sequence[int] | Sequence[str]) -> bool:
        """Return True if these are the ids, in this order."""
        return len(ids) == len(self) and bool(self._ids.equals(_ids(ids)))

    def map_to(self, ids: Sequence[int] | Sequence[str]) -> np.ndarray:
        """Return the number of each own id in another list of ids; 0 where it is missing there.

        Shape [first + len(self)].

        Args:
            ids: of another table; the first has the number `first` there.
        """
        own, other = self._ids, _ids(ids)
        if own.type != other.type:
            own, other = own.cast(pa.string()), other.cast(pa.string())
        numbers = pc.fill_null(pc.add(pc.index_in(own, value_set=other), self.first), 0).to_numpy()
        return np.concatenate([np.zeros(self.first, np.int32), numbers])

    def ids(self, numbers: np.ndarray) -> list[int] | list[str]:
        """Return the ids of these numbers [M]."""
        ids: list[int] | list[str] = self._ids.take(pa.array(np.asarray(numbers) - self.first)).to_pylist()
        return ids

    def titles(self, numbers: np.ndarray) -> list[str | None]:
        """Return the titles of these numbers [M]; None where the source has no title."""
        if "title" not in self.table.column_names:
            return [None] * len(numbers)
        titles: list[str | None] = (
            self.table.column("title").take(pa.array(np.asarray(numbers) - self.first)).to_pylist()
        )
        return titles

    def numbers(self, ids: Iterable[int | str]) -> np.ndarray:
        """Return the numbers [M] int64 of these ids. Text is accepted for an integer id.

        Raises:
            ValueError: if an id is unknown.
        """
        given = list(ids)
        numbers = np.empty(len(given), np.int64)
        for i, one in enumerate(given):
            try:
                row = pc.index(self._ids, pa.scalar(one).cast(self._ids.type)).as_py()
            except (pa.ArrowInvalid, OverflowError):
                row = -1
            if row < 0:
                similar = ", ".join(map(repr, self._neighbors(one)))
                raise ValueError(
                    f"there is no {self.what} {one!r} among the {len(self):,} {self.what}s; similar: {similar}"
                )
            numbers[i] = row + self.first
        return numbers

    def _neighbors(self, one: int | str) -> list[int] | list[str]:
        """Return up to four ids next to the position of this one in the order of ids."""
        ids: list[Any] = self._ids.to_pylist()
        try:
            position = bisect_left(ids, type(ids[0])(one))
        except ValueError:  # not a number, where ids are numbers
            position = 0
        return ids[max(0, min(position, len(ids) - 2) - 2) :][:4]


def _ids(ids: Sequence[int] | Sequence[str]) -> pa.Array:
    return pa.array(ids, pa.string() if ids and isinstance(ids[0], str) else pa.int64())
