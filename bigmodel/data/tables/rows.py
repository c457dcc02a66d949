"""Blocks of rows, as every table reader yields them, and the selection of columns.

M rows in a block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc


class ColumnSelector(Protocol):
    """Selection of a table's columns, by role."""

    def select_columns(self, where: str, available: Sequence[str]) -> dict[str, str]:
        """Return the name of the column of each role, usually by `find_columns`.

        Args:
            where: the table, for messages.
            available: names of its columns.

        Raises:
            ValueError: if a required column is missing.
        """


def find_columns(
    where: str, available: Sequence[str], names: Mapping[str, Sequence[str]], optional: Collection[str] = ()
) -> dict[str, str]:
    """Return the name of the column of each role: the first candidate that the table has.

    Args:
        where: the table, for messages.
        available: names of its columns.
        names: candidate names for the column of each role. The flag of a role `x` is --data.x_column.
        optional: roles that may be missing.

    Raises:
        ValueError: if a required column is missing.
    """
    found = {}
    for role, candidates in names.items():
        name = next((name for name in candidates if name in available), None)
        if name is not None:
            found[role] = name
        elif role not in optional:
            missing = " or ".join(map(repr, candidates))
            raise ValueError(
                f"{where}: there is no column {missing}, only {list(available)}; set --data.{role}_column to one of them"
            )
    return found


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a table.

    Attributes:
        where: the file.
        first: the number of the first row, for messages.
        columns: by role, an array of M values each.
        typed: True if the file has column types. False: all columns are text, which may represent numbers or lists.
        size: approximate bytes of these rows in the file.
        word: "row" or "line", for messages.
        classes: class names that Hugging Face's `datasets` stores for a column of class indices, by role.
        locate: converts the number of a row to that in messages; None: the same.
    """

    where: str
    first: int
    columns: dict[str, pa.Array]
    typed: bool
    size: int
    word: str = "row"
    classes: Mapping[str, list[str]] = field(default_factory=dict)
    locate: Callable[[int], int] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def name(self, row: int) -> str:
        """Return file and number of one of these rows, for messages."""
        number = self.first + row
        return f"{self.where} {self.word} {number if self.locate is None else self.locate(number):,}"


def is_text(kind: pa.DataType) -> bool:
    """True if a column of this type holds strings."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def decode_dictionary(values: pa.Array) -> pa.Array:
    """Return a column without dictionary encoding, its strings as `string`."""
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    return values.cast(pa.string()) if is_text(values.type) else values


def first_index(values: pa.Array) -> int:
    """Return the index of the first true value; -1 if there is none."""
    return int(pc.index(values, True).as_py())
