"""Events in Parquet files, and in other tables of Arrow; read in record batches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import closing

import pyarrow as pa
import pyarrow.parquet as pq

from bigmodel.tasks.recommendation.sources.columns import Columns, Rows

_ROWS_AT_ONCE = 2**19


def read_parquet(path: str, columns: Columns) -> Iterator[Rows]:
    """The rows of a Parquet file, counted from 0, as by the libraries that read this format.

    Raises:
        ValueError: if it cannot be read or lacks a column.
    """
    try:
        with closing(pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)) as file:
            found = columns.found(path, file.schema_arrow.names)
            batches = file.iter_batches(_ROWS_AT_ONCE, columns=list(found.values()))
            bytes_a_row = os.path.getsize(path) / max(file.metadata.num_rows, 1)
            yield from _rows(path, batches, found, bytes_a_row)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error


def read_tables(where: str, tables: Iterable[pa.Table], columns: Columns) -> Iterator[Rows]:
    """The rows of tables of Arrow that lie one after the other, counted from 0."""
    first = 0
    for table in tables:
        found = columns.found(where, table.column_names)
        for rows in _rows(where, table.to_batches(_ROWS_AT_ONCE), found, 0.0, first):
            yield rows
            first += len(rows)


def _rows(
    where: str, batches: Iterable[pa.RecordBatch], found: dict[str, str], bytes_a_row: float, first: int = 0
) -> Iterator[Rows]:
    for batch in batches:
        columns = {role: batch.column(name) for role, name in found.items()}
        yield Rows(where, first, columns, True, int(bytes_a_row * len(batch)))
        first += len(batch)
