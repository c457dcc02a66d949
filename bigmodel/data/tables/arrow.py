"""Readers of Parquet files, Arrow files of Hugging Face's `datasets`, and other Arrow tables, in record batches."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from bigmodel.data.tables.rows import Columns, Rows

_ROWS_AT_ONCE = 2**14


@contextmanager
def open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file for reading in pieces, without a whole row group in memory.

    Raises:
        ValueError: if it cannot be read, then or later.
    """
    try:
        with closing(pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error


def read_parquet(path: str, columns: Columns, rows_at_once: int = _ROWS_AT_ONCE) -> Iterator[Rows]:
    """Yield the rows of a Parquet file, counted from 0, as by the libraries that read this format.

    Raises:
        ValueError: if it cannot be read or lacks a column.
    """
    with open_parquet(path) as file:
        names = columns.found(path, file.schema_arrow.names).values()
        batches = file.iter_batches(rows_at_once, columns=list(names))
        bytes_a_row = os.path.getsize(path) / max(file.metadata.num_rows, 1)
        yield from rows_of(path, file.schema_arrow, batches, columns, rows_at_once, bytes_a_row)


def read_arrow(where: str, paths: Iterable[str], columns: Columns) -> Iterator[Rows]:
    """Yield the rows of Arrow files written by Hugging Face's `datasets`, as one table, counted from 0.

    Raises:
        ValueError: if a file is damaged, or lacks a column.
    """
    first = 0
    for path in paths:
        try:
            with pa.memory_map(path) as file, pa.ipc.open_stream(file) as stream:
                for rows in rows_of(where, stream.schema, stream, columns, first=first):
                    yield rows
                    first += len(rows)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} cannot be read as an Arrow file of datasets: {error}") from error


def rows_of(
    where: str,
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch],
    columns: Columns,
    rows_at_once: int = _ROWS_AT_ONCE,
    bytes_a_row: float = 0.0,
    first: int = 0,
) -> Iterator[Rows]:
    """Yield the rows of consecutive record batches.

    Args:
        where: the table, for messages.
        schema: of the batches.
        batches: in order.
        columns: those that are read.
        rows_at_once: in a block, at most.
        bytes_a_row: approximate size in the file.
        first: the number of the first row, for messages.

    Raises:
        ValueError: if a column is missing.
    """
    found = columns.found(where, schema.names)
    classes = {role: names for role, name in found.items() if (names := class_names(schema, name))}
    for batch in batches:
        for start in range(0, len(batch), rows_at_once):
            some = batch.slice(start, rows_at_once)
            cells = {role: some.column(name) for role, name in found.items()}
            yield Rows(where, first, cells, True, int(bytes_a_row * len(some)), classes=classes)
            first += len(some)


def class_names(schema: pa.Schema, column: str) -> list[str] | None:
    """Return the class names stored by Hugging Face's `datasets` for a column of class numbers, or of lists of these."""
    written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = written.get("info", {}).get("features", {}).get(column, {})
    if isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
        feature = feature["feature"]
    if isinstance(feature, list):  # older versions wrote a list
        feature = feature[0]
    return feature.get("names") if isinstance(feature, dict) else None
