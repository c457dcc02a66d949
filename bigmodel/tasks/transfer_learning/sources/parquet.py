"""Labelled texts in Parquet files, in Arrow files, and in other tables of Arrow; read in record batches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import closing

import pyarrow as pa
import pyarrow.parquet as pq

from bigmodel.tasks.transfer_learning.sources.columns import Columns, Rows, class_names

_ROWS_AT_ONCE = 2**14


def read_parquet(path: str, columns: Columns) -> Iterator[Rows]:
    """The rows of a Parquet file, counted from 0, as by the libraries that read this format.

    Raises:
        ValueError: if it cannot be read or lacks a column.
    """
    try:
        with closing(pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)) as file:
            names = list(columns.found(path, file.schema_arrow.names).values())
            batches = file.iter_batches(_ROWS_AT_ONCE, columns=names)
            bytes_a_row = os.path.getsize(path) / max(file.metadata.num_rows, 1)
            yield from rows_of(path, file.schema_arrow, batches, columns, bytes_a_row)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error


def read_arrow(where: str, paths: Iterable[str], columns: Columns) -> Iterator[Rows]:
    """The rows of files that Hugging Face's `datasets` wrote, as one table, counted from 0.

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
    bytes_a_row: float = 0.0,
    first: int = 0,
) -> Iterator[Rows]:
    """The rows of record batches that lie one after the other.

    Raises:
        ValueError: if a column is not there.
    """
    found, classes = columns.found(where, schema.names), class_names(schema, columns.label)
    for batch in batches:
        for start in range(0, len(batch), _ROWS_AT_ONCE):
            some = batch.slice(start, _ROWS_AT_ONCE)
            cells = {role: some.column(name) for role, name in found.items()}
            yield Rows(where, first, cells, True, int(bytes_a_row * len(some)), classes=classes)
            first += len(some)
