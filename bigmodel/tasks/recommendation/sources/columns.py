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
    "time": ("timestamp", "time", "date", "datetime", "created_at"),
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
        time: by default timestamp, time, date, datetime or created_at, if there is such a column.
        column_names: of text tables without a header line, one for each column.
    """

    user: str | None = None
    item: str | None = None
    rating: str | None = None
    time: str | None = None
    column_names: list[str] | None = None

    def select_columns(self, where: str, available: Sequence[str]) -> dict[str, str]:
        """Return the column of each role: user, item, and if available rating, time, title, genres.

        Raises:
            ValueError: if a required or named column is missing.
        """
        given = {role: name for role, name in vars(self).items() if name is not None and role != "column_names"}
        names = _USUAL | {role: (name,) for role, name in given.items()}
        found = find_columns(where, available, names, optional=_USUAL.keys() - {"user", "item", *given})
        for name in found.values():
            if available.count(name) > 1:
                raise ValueError(f"{where}: {available.count(name)} columns have the name {name!r}: rename all but one")
        if found["user"] == found["item"]:
            raise ValueError(
                f"{where}: users and items are both the column {found['user']!r}; set --data.user_column and"
                " --data.item_column to different columns"
            )
        return found

    @property
    def known(self) -> frozenset[str]:
        """Names of columns by which a header line is recognized."""
        usual = [name for names in _USUAL.values() for name in names]
        return frozenset([*usual, *(name for name in (self.user, self.item, self.rating, self.time) if name)])


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
        splits: the split (train, val, test) of each file, if the files are named by split.
    """

    where: str
    content: str
    rows: Callable[[], Iterator[Rows]]
    titles: Callable[[], pa.Table | None] = lambda: None
    size: int = 0
    splits: dict[str, str] | None = None
