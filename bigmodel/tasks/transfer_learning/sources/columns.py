"""The columns of a table of labelled texts, and what was found of such tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from bigmodel.data.tables import Rows, find_columns


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table of labelled texts.

    Args:
        text: the texts.
        pair: a second text for each; None: there is none.
        label: a class, several, or a number; None: no labels are looked for.
        split: train, val or test; None: the files' names say it, or nothing does.
        confidence: a number for each row, by which rows are chosen later; None: there is none.
    """

    text: str = "text"
    pair: str | None = None
    label: str | None = "label"
    split: str | None = None
    confidence: str | None = None

    def found(self, where: str, there: Sequence[str]) -> dict[str, str]:
        """Names by role, in a table with these columns.

        Raises:
            ValueError: if one is not there.
        """
        return find_columns(where, there, {role: (name,) for role, name in vars(self).items() if name is not None})


@dataclass(frozen=True)
class Part:
    """A file, or a split of a data set, unread.

    Attributes:
        where: what a person calls it.
        split: train, val or test; None: it does not say.
        rows: reads it.
        size: bytes, about.
    """

    where: str
    split: str | None
    rows: Callable[[], Iterator[Rows]]
    size: int = 0


@dataclass(frozen=True)
class Source:
    """Texts that were found, unread.

    Attributes:
        where: what the person gave.
        content: is another when the texts or labels may be others; neither names nor places count, but the splits do.
        parts: what is read, in order.
        left_out: parts that are none of the splits.
    """

    where: str
    content: str
    parts: list[Part]
    left_out: list[str] = field(default_factory=list)
