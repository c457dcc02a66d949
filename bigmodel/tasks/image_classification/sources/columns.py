"""The columns of a table of images, and conversion of Arrow columns.

N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigmodel.data.split_shares import SPLIT_WORDS, split_name
from bigmodel.tasks.image_classification.batch import ImageStore
from bigmodel.tasks.image_classification.sources.dataset_index import Labels, RawDataset, RawSplit
from bigmodel.tasks.image_classification.sources.image_storage import ConcatStore, SubsetStore


@dataclass
class ImageColumns:
    """Names of the columns of a table (CSV, TSV, Parquet, Hugging Face).

    Args:
        image: the images: paths, or in Parquet and Hugging Face datasets the encoded bytes.
        label: class names or class numbers.
        split: train, val or test; None: taken from the file names, if they contain it.
    """

    image: str = "image"
    label: str = "label"
    split: str | None = None

    def wanted(self, labelled: bool) -> list[str]:
        """Return the columns to read: without labels, splits are not needed either."""
        if not labelled:
            return [self.image]
        return [self.image, self.label, *([self.split] if self.split else [])]

    def parse_split(self, word: str, where: str) -> str:
        """Return the split that the cell at `where` names; raise an error if it names none."""
        if (split := split_name(word)) is None:
            raise ValueError(f"{where}: {word!r} in column {self.split!r} is not a split; accepted are {SPLIT_WORDS}")
        return split

    def check(self, where: str, present: Sequence[str], wanted: Sequence[str]) -> None:
        """Raise an error if a table lacks a requested column."""
        for flag, column in (("image", self.image), ("label", self.label), ("split", self.split)):
            if column in wanted and column not in present:
                raise ValueError(f"{where}: no column {column!r} among {list(present)}; set --data.columns.{flag}")


def rows_of(splits: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the rows [n] int64 of each split, from each row's split [N]."""
    return {split: np.flatnonzero(np.array(splits) == split) for split in dict.fromkeys(splits)}


def holds_bytes(kind: pa.DataType) -> bool:
    """True if a column of this type holds encoded images: binary, or struct<bytes, path> of Hugging Face."""
    if pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}:
        kind = kind.field("bytes").type
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def parts_found(
    where: str,
    parts: dict[str, tuple[ImageStore, pa.Table]],
    columns: ImageColumns,
    labelled: bool,
    classes: list[str] | None,
) -> RawDataset:
    """Return splits from parts (split -> images and their table); or from the split column, over all parts."""
    if not labelled:
        return RawDataset(where, {split: RawSplit(store, None) for split, (store, _) in parts.items()})
    if columns.split is None:
        found = {
            split: RawSplit(store, _labels(table, columns.label, store)) for split, (store, table) in parts.items()
        }
        return RawDataset(where, found, classes)
    store = ConcatStore([store for store, _ in parts.values()])
    table = pa.concat_tables([table for _, table in parts.values()])
    labels = _labels(table, columns.label, store)
    words = _filled(table, columns.split, store).to_pylist()
    splits = [columns.parse_split(str(word), store.name(row)) for row, word in enumerate(words)]
    found = {}
    for split, rows in rows_of(splits).items():
        chosen = labels[rows] if isinstance(labels, np.ndarray) else [labels[i] for i in rows]
        found[split] = RawSplit(SubsetStore(store, rows), chosen)
    return RawDataset(where, found, classes)


def _filled(table: pa.Table, column: str, store: ImageStore) -> pa.ChunkedArray:
    """Return a column without nulls; strings are decoded from any encoding of Arrow."""
    values = table.column(column)
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    empty = pc.is_null(values)
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        empty = pc.or_kleene(empty, pc.equal(values, ""))
    row = pc.index(empty, True).as_py()
    if row >= 0:
        raise ValueError(f"{store.name(row)}: column {column!r} is empty")
    return values


def _labels(table: pa.Table, column: str, store: ImageStore) -> Labels:
    values = _filled(table, column, store)
    if pa.types.is_integer(values.type):
        return values.to_numpy().astype(np.int64)
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return list(values.to_pylist())
    raise ValueError(
        f"{store.name(0)}: column {column!r} is of type {values.type}; labels are integers or strings:"
        " set --data.columns.label to such a column"
    )
