"""The blocks of rows in which every reader gives a table, and the names of its columns.

M rows in a block.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc


class Columns(Protocol):
    """Which columns of a table are read, and as what."""

    def found(self, where: str, there: Sequence[str]) -> dict[str, str]:
        """Names of columns by role, in a table with these columns; `find_columns` helps.

        Raises:
            ValueError: if one that is needed is not there.
        """


def find_columns(
    where: str, there: Sequence[str], names: Mapping[str, Sequence[str]], optional: Collection[str] = ()
) -> dict[str, str]:
    """Names of columns by role, of those that a table may have: the first that is there.

    Args:
        where: the table, for messages.
        there: its columns.
        names: what the column of each role may be called. The flag of a role `x` is --data.x_column.
        optional: roles that need not be there.

    Raises:
        ValueError: if another is not there.
    """
    found = {}
    for role, candidates in names.items():
        name = next((name for name in candidates if name in there), None)
        if name is not None:
            found[role] = name
        elif role not in optional:
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
        columns: by role; arrays of M each.
        typed: whether the columns' types are the source's own. If not, all are text that may spell numbers or lists.
        size: bytes of the file that they take, about.
        word: what a person calls a row.
        classes: names that Hugging Face's `datasets` wrote beside a column of class numbers, by role.
    """

    where: str
    first: int
    columns: dict[str, pa.Array]
    typed: bool
    size: int
    word: str = "row"
    classes: Mapping[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def name(self, row: int) -> str:
        """What a person calls a row of these: file and row."""
        return f"{self.where} {self.word} {self.first + row:,}"


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def plain(values: pa.Array) -> pa.Array:
    """A column whose strings are kept in one way, not as a dictionary or a view."""
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    return values.cast(pa.string()) if is_text(values.type) else values


def first_true(values: pa.Array) -> int:
    """The first row that holds; -1 if none does."""
    return int(pc.index(values, True).as_py())
