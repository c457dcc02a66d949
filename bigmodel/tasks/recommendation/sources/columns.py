"""The columns of a table of events, and what was found of such tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from bigmodel.data.tables import Rows, find_columns

_USUAL = {
    "user": ("user_id", "userId"),
    "item": ("item_id", "movieId"),
    "rating": ("rating",),
    "time": ("timestamp",),
    "title": ("title",),
    "genres": ("genres",),
}


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table of events.

    Args:
        user: by default user_id or userId.
        item: by default item_id or movieId.
        rating: by default rating, if there is such a column.
        time: by default timestamp, if there is such a column.
    """

    user: str | None = None
    item: str | None = None
    rating: str | None = None
    time: str | None = None

    def found(self, where: str, there: Sequence[str]) -> dict[str, str]:
        """Names by role (user, item, and rating, time, title, genres where they are), in a table with these columns.

        Raises:
            ValueError: if a column that is needed or named is not there.
        """
        given = {role: name for role, name in vars(self).items() if name is not None}
        names = _USUAL | {role: (name,) for role, name in given.items()}
        return find_columns(where, there, names, optional=_USUAL.keys() - {"user", "item", *given})


@dataclass(frozen=True)
class Source:
    """Events that were found, unread.

    Attributes:
        where: what the person gave.
        content: is another when the events may be others; neither names nor places count.
        rows: reads them.
        titles: reads what items are called: a table of strings with the columns `id`, `title`, `genres` (nulls where there
            are none); None if the events say so themselves, or nothing does.
        size: bytes in all, about.
    """

    where: str
    content: str
    rows: Callable[[], Iterator[Rows]]
    titles: Callable[[], pa.Table | None] = lambda: None
    size: int = 0
