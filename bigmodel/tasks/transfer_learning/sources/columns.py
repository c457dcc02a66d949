"""The columns of a table of labelled texts, and the blocks of rows in which every reader gives them.

M rows in a block.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
SPLIT_WORDS = ", ".join(_SPLIT_NAMES)


def split_name(word: str) -> str | None:
    """`train`, `val` or `test` for a word that means one of them."""
    return _SPLIT_NAMES.get(word.strip().lower())


def split_in(name: str) -> str | None:
    """The split that the name of a file or split says (train-00000-of-00002, sst2_dev, validation_matched); None if none,
    or several."""
    found = {split for word in re.split(r"[^a-zA-Z]+", name) if (split := split_name(word)) is not None}
    return found.pop() if len(found) == 1 else None


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
        found = {role: name for role, name in vars(self).items() if name is not None}
        for role, name in found.items():
            if name not in there:
                raise ValueError(
                    f"{where}: there is no column {name!r}, only {list(there)}; set --data.{role}_column to one of them"
                )
        return found


@dataclass(frozen=True)
class Rows:
    """Some rows of a table, one after the other.

    Attributes:
        where: the file.
        first: what a person counts the first of them as.
        columns: by role (see `Columns`); arrays of M each.
        typed: whether the columns' types are the source's own. If not, all are text that may spell numbers or lists.
        size: bytes of the file that they take, about.
        word: what a person calls a row.
        classes: names of the classes, by the numbers that stand in `label`; None: what stands there is the class.
    """

    where: str
    first: int
    columns: dict[str, pa.Array]
    typed: bool
    size: int
    word: str = "row"
    classes: list[str] | None = None

    def __len__(self) -> int:
        return len(self.columns["text"])

    def name(self, row: int) -> str:
        """What a person calls a row of these: file and row."""
        return f"{self.where} {self.word} {self.first + row:,}"


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


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def plain(values: pa.Array) -> pa.Array:
    """A column whose strings are kept in one way, not as a dictionary or a view."""
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    return values.cast(pa.string()) if is_text(values.type) else values


def class_names(schema: pa.Schema, label: str | None) -> list[str] | None:
    """The class names that Hugging Face's datasets wrote beside a column of class numbers, or of lists of these."""
    written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = written.get("info", {}).get("features", {}).get(label, {})
    if isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
        feature = feature["feature"]
    if isinstance(feature, list):  # as older ones wrote a list
        feature = feature[0]
    return feature.get("names") if isinstance(feature, dict) else None


def first_true(values: pa.Array) -> int:
    """The first row that holds; -1 if none does."""
    return int(pc.index(values, True).as_py())
