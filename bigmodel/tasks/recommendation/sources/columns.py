"""The columns of a table of events, and the blocks of rows in which every reader gives them.

M rows in a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

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
        found = {}
        for role, usual in _USUAL.items():
            named = getattr(self, role, None)
            candidates = usual if named is None else (named,)
            for name in candidates:
                if name in there:
                    found[role] = name
                    break
            else:
                if named is not None or role in ("user", "item"):
                    asked = " or ".join(map(repr, candidates))
                    raise ValueError(
                        f"{where}: there is no column {asked}, only {list(there)}; set --data.{role}_column to one of them"
                    )
        return found


@dataclass(frozen=True)
class Rows:
    """Some rows of a table, one after the other.

    Attributes:
        where: the file.
        first: what a person counts the first of them as.
        columns: by role: user, item, and where they are rating, time, title, genres; arrays of M each.
        typed: whether the columns' types are the source's own. If not, all are text that may spell numbers.
        size: bytes of the file that they take, about.
        word: what a person calls a row.
    """

    where: str
    first: int
    columns: dict[str, pa.Array]
    typed: bool
    size: int
    word: str = "row"

    def __len__(self) -> int:
        return len(self.columns["user"])

    def name(self, row: int) -> str:
        """What a person calls a row of these: file and row."""
        return f"{self.where} {self.word} {self.first + row:,}"


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
