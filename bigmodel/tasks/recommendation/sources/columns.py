"""Columns of a table of events, and the description of a source."""

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
class InteractionColumns:
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

    def select_columns(self, where: str, available: Sequence[str]) -> dict[str, str]:
        """Return the column of each role: user, item, and if available rating, time, title, genres.

        Raises:
            ValueError: if a required or named column is missing.
        """
        given = {role: name for role, name in vars(self).items() if name is not None}
        names = _USUAL | {role: (name,) for role, name in given.items()}
        return find_columns(where, available, names, optional=_USUAL.keys() - {"user", "item", *given})


@dataclass(frozen=True)
class InteractionSource:
    """Source of events, not yet read.

    Attributes:
        where: the path, for messages.
        content: hash of the events, independent of file names and folders.
        rows: reads the events.
        titles: reads ids and titles of items: a table of strings with the columns `id`, `title`, `genres` (null where
            missing); None if there are no titles, or they are columns of the events.
        size: approximate bytes.
    """

    where: str
    content: str
    rows: Callable[[], Iterator[Rows]]
    titles: Callable[[], pa.Table | None] = lambda: None
    size: int = 0
