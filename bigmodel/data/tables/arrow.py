"""Readers of Parquet files, Arrow files of Hugging Face's `datasets`, and other Arrow tables, in record batches."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from bigmodel.data.tables.rows import ColumnSelector, Rows

_ROWS_AT_ONCE = 2**14


@contextmanager
def open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file for reading in parts smaller than a row group.

    Raises:
        ValueError: if it cannot be opened, or cannot be read within the context.
    """
    try:
        with closing(pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error


def read_parquet(path: str, columns: ColumnSelector, rows_at_once: int = _ROWS_AT_ONCE) -> Iterator[Rows]:
    """Yield the rows of a Parquet file, numbered from 0, as in pandas and pyarrow.

    Raises:
        ValueError: if it cannot be read or lacks a column.
    """
    with open_parquet(path) as file:
        names = columns.select_columns(path, file.schema_arrow.names).values()
        batches = file.iter_batches(rows_at_once, columns=list(names))
        bytes_a_row = os.path.getsize(path) / max(file.metadata.num_rows, 1)
        yield from iter_blocks(path, file.schema_arrow, batches, columns, rows_at_once, bytes_a_row)


def read_arrow(where: str, paths: Iterable[str], columns: ColumnSelector) -> Iterator[Rows]:
    """Yield the rows of Arrow files written by Hugging Face's `datasets`, as one table, numbered from 0.

    Raises:
        ValueError: if a file is damaged, or lacks a column.
    """
    first = 0
    for path in paths:
        try:
            with pa.memory_map(path) as file, pa.ipc.open_stream(file) as stream:
                for rows in iter_blocks(where, stream.schema, stream, columns, first=first):
                    yield rows
                    first += len(rows)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} cannot be read as an Arrow file of datasets: {error}") from error


def iter_blocks(
    where: str,
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch],
    columns: ColumnSelector,
    rows_at_once: int = _ROWS_AT_ONCE,
    bytes_a_row: float = 0.0,
    first: int = 0,
) -> Iterator[Rows]:
    """Yield the rows of consecutive record batches.

    Args:
        where: the table, for messages.
        schema: of the batches.
        batches: in order.
        columns: selects the columns to read.
        rows_at_once: maximum number of rows in a block.
        bytes_a_row: approximate size of a row in the file.
        first: number of the first row, for messages.

    Raises:
        ValueError: if a column is missing.
    """
    found = columns.select_columns(where, schema.names)
    classes = {role: names for role, name in found.items() if (names := class_names(schema, name))}
    for batch in batches:
        for start in range(0, len(batch), rows_at_once):
            some = batch.slice(start, rows_at_once)
            cells = {role: some.column(name) for role, name in found.items()}
            yield Rows(where, first, cells, True, int(bytes_a_row * len(some)), classes=classes)
            first += len(some)


def class_names(schema: pa.Schema, column: str) -> list[str] | None:
    """Return the class names that Hugging Face's `datasets` stores for a column of class indices, or of lists of them."""
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = metadata.get("info", {}).get("features", {}).get(column, {})
    if isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
        feature = feature["feature"]
    if isinstance(feature, list):  # of older versions
        feature = feature[0]
    return feature.get("names") if isinstance(feature, dict) else None
