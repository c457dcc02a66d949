"""Blocks of rows, returned by every reader of tables, and column names.

M rows in a block.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc


class Columns(Protocol):
    """Selection of a table's columns, by role."""

    def found(self, where: str, there: Sequence[str]) -> dict[str, str]:
        """Return the names of columns by role, in a table with these columns; `find_columns` helps.

        Raises:
            ValueError: if a required one is missing.
        """


def find_columns(
    where: str, there: Sequence[str], names: Mapping[str, Sequence[str]], optional: Collection[str] = ()
) -> dict[str, str]:
    """Return the names of columns by role: for each, the first candidate that exists.

    Args:
        where: the table, for messages.
        there: its columns.
        names: candidate names for the column of each role. The flag of a role `x` is --data.x_column.
        optional: roles that may be missing.

    Raises:
        ValueError: if a required one is missing.
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
    """Consecutive rows of a table.

    Attributes:
        where: the file.
        first: the number of the first row, for messages.
        columns: by role; arrays of M each.
        typed: True if the columns' types are the source's own. If not, all are text that may represent numbers or
            lists.
        size: approximate bytes of these rows in the file.
        word: the term for a row, for messages.
        classes: names stored by Hugging Face's `datasets` for a column of class numbers, by role.
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
        """Format file and number of one of these rows, for messages."""
        return f"{self.where} {self.word} {self.first + row:,}"


def is_text(kind: pa.DataType) -> bool:
    """True if a column of this type holds strings."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def plain(values: pa.Array) -> pa.Array:
    """Return a column with its strings as `string`, not as a dictionary or a view."""
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    return values.cast(pa.string()) if is_text(values.type) else values


def first_true(values: pa.Array) -> int:
    """Return the index of the first true row; -1 if there is none."""
    return int(pc.index(values, True).as_py())
