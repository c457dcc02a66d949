"""User-item events as flat arrays: grouped by user, in chronological order.

Items have the numbers 1 to I (0 is padding), users 0 to U - 1.

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
        times: [N] int64, whole seconds since 1970; None: the source has none, and its order is used.
        ratings: [N] float32, or None.
        num_items: I, the largest number that an item may have.
    """

    offsets: np.ndarray
    items: np.ndarray
    times: np.ndarray | None
    ratings: np.ndarray | None
    num_items: int

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
        )

    def renumbered(self, numbers: np.ndarray, num_items: int) -> Interactions:
        """Return the events with other item numbers; those of items without one are left out.

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
        )


def ranges(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Return the numbers [sum of stops - starts] int64 of all ranges from `starts` [M] to `stops` [M], concatenated."""
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
class Ids:
    """Ids of users or items in the source.

    Args:
        table: column `id` (int64 or string), ascending; of items also `title` and `genres` where the source has them.
        first: the number of the first row.
        what: user or item, for messages.
    """

    table: pa.Table
    first: int
    what: str

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @cached_property
    def _ids(self) -> pa.Array:
        return self.table.column("id").combine_chunks()

    def same(self, ids: Sequence[int] | Sequence[str]) -> bool:
        """True if these are the ids, in this order."""
        return len(ids) == len(self) and bool(self._ids.equals(_ids(ids)))

    def numbers_in(self, ids: Sequence[int] | Sequence[str]) -> np.ndarray:
        """Return the position of each own id in another list of ids, counted from `first`; 0 where it is missing.

        Shape [first + len(self)].

        Args:
            ids: of another table; the first has the number `first` there.
        """
        own, other = self._ids, _ids(ids)
        if own.type != other.type:
            own, other = own.cast(pa.string()), other.cast(pa.string())
        found = pc.fill_null(pc.add(pc.index_in(own, value_set=other), self.first), 0).to_numpy()
        return np.concatenate([np.zeros(self.first, np.int32), found])

    def ids(self, numbers: np.ndarray) -> list[int] | list[str]:
        """Return the ids of these numbers [M]."""
        found: list[int] | list[str] = self._ids.take(pa.array(np.asarray(numbers) - self.first)).to_pylist()
        return found

    def titles(self, numbers: np.ndarray) -> list[str | None]:
        """Return the titles of these numbers [M]; None where the source has none."""
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
        found = np.empty(len(given), np.int64)
        for i, one in enumerate(given):
            try:
                row = pc.index(self._ids, pa.scalar(one).cast(self._ids.type)).as_py()
            except (pa.ArrowInvalid, OverflowError):
                row = -1
            if row < 0:
                near = ", ".join(map(repr, self._near(one)))
                raise ValueError(f"there is no {self.what} {one!r}; there are {len(self):,}, near it {near}")
            found[i] = row + self.first
        return found

    def _near(self, one: int | str) -> list[int] | list[str]:
        """Return up to four ids next to the position of this one."""
        there: list[Any] = self._ids.to_pylist()
        try:
            place = bisect_left(there, type(there[0])(one))
        except ValueError:  # not a number, where ids are numbers
            place = 0
        return there[max(0, min(place, len(there) - 2) - 2) :][:4]


def _ids(ids: Sequence[int] | Sequence[str]) -> pa.Array:
    return pa.array(ids, pa.string() if ids and isinstance(ids[0], str) else pa.int64())
