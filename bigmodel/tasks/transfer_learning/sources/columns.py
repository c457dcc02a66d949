"""The columns of a table of labelled texts, and the description of a source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from bigmodel.data.tables import Rows, find_columns


@dataclass(frozen=True)
class TextColumns:
    """Names of the columns of a table of labelled texts.

    Args:
        text: the texts.
        pair: a second text for each; None: there is none.
        label: a class, several, or a number; None: no labels are read.
        split: train, val or test; None: taken from the file names, if they contain it.
        confidence: a number for each row, by which rows are selected later; None: there is none.
    """

    text: str = "text"
    pair: str | None = None
    label: str | None = "label"
    split: str | None = None
    confidence: str | None = None

    def select_columns(self, where: str, there: Sequence[str]) -> dict[str, str]:
        """Return names by role, in a table with these columns.

        Raises:
            ValueError: if one is missing.
        """
        return find_columns(where, there, {role: (name,) for role, name in vars(self).items() if name is not None})


@dataclass(frozen=True)
class SourcePart:
    """A file, or a split of a dataset, unread.

    Attributes:
        where: its name for messages.
        split: train, val or test; None: unknown.
        rows: reads it.
        size: bytes, about.
    """

    where: str
    split: str | None
    rows: Callable[[], Iterator[Rows]]
    size: int = 0


@dataclass(frozen=True)
class TextSource:
    """Texts that were found, but not read.

    Attributes:
        where: the path that was given.
        content: a hash that changes with the texts, labels or splits; names and places do not count.
        parts: the parts to read, in order.
        left_out: parts that belong to none of the splits.
    """

    where: str
    content: str
    parts: list[SourcePart]
    left_out: list[str] = field(default_factory=list)
