"""Files of predictions: Parquet, CSV (`.csv`) or JSON lines (`.jsonl`), by the suffix, written table by table."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq


class TableWriter(Protocol):
    """Appends tables of one schema to a file."""

    def write(self, table: pa.Table) -> None: ...

    def close(self) -> None: ...


def open_table(path: Path, name: str, schema: pa.Schema, metadata: Mapping[str, str]) -> TableWriter:
    """Open a file for tables.

    Args:
        path: the file to write.
        name: its final name, whose suffix selects the format: .csv, .jsonl or .ndjson; Parquet for any other.
        schema: of the tables.
        metadata: of the file; only Parquet has any.
    """
    suffix = Path(name).suffix.lower()
    if suffix == ".csv":
        return _CSV(path, schema)
    if suffix in (".jsonl", ".ndjson"):
        return _JSONLines(path)
    return _Parquet(path, schema.with_metadata(dict(metadata)))


class _Parquet:
    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(path, schema)

    def write(self, table: pa.Table) -> None:
        self._writer.write_table(table.replace_schema_metadata(self._writer.schema.metadata))

    def close(self) -> None:
        self._writer.close()


class _CSV:
    """A header, then a line for each row; a list is written as JSON."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        self._writer.writerow(schema.names)

    def write(self, table: pa.Table) -> None:
        for row in table.to_pylist():
            self._writer.writerow(
                json.dumps(value, default=str) if isinstance(value, list | dict) else value for value in row.values()
            )

    def close(self) -> None:
        self._file.close()


class _JSONLines:
    """A JSON object for each row; a number that is not finite is null, which JSON lacks otherwise."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def write(self, table: pa.Table) -> None:
        for row in table.to_pylist():
            self._file.write(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False, default=str) + "\n")

    def close(self) -> None:
        self._file.close()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and value - value != 0 else value
