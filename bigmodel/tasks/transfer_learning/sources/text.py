"""Labelled texts in text: CSV and TSV with a line of names, JSON Lines.

In CSV, texts with line ends or delimiters stand in double quotes. In TSV a quote is a character like any other, as its
registration says (IANA, text/tab-separated-values) and as GLUE's files have it.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.csv

from bigmodel.tasks.transfer_learning.sources.columns import Columns, Rows

_BLOCK_BYTES = 4 * 2**20  # a row must fit; some ten blocks are read ahead
_LINES_AT_ONCE = 2**12


def read_table(path: str, columns: Columns) -> Iterator[Rows]:
    """The rows of a CSV or TSV, counted from 1 below the names. All columns are text.

    Raises:
        ValueError: if it cannot be read or lacks a column.
    """
    delimiter, found = _header(path, columns)
    kinds = dict.fromkeys(found.values(), pa.string())
    first = 1
    try:
        with pa.OSFile(path) as file:
            reader = pyarrow.csv.open_csv(
                file,
                pyarrow.csv.ReadOptions(block_size=_BLOCK_BYTES),
                pyarrow.csv.ParseOptions(
                    delimiter=delimiter,
                    quote_char=False if delimiter == "\t" else '"',
                    newlines_in_values=delimiter != "\t",
                ),
                pyarrow.csv.ConvertOptions(include_columns=list(kinds), column_types=kinds),
            )
            for batch in reader:
                cells = {role: batch.column(name) for role, name in found.items()}
                yield Rows(path, first, cells, typed=False, size=batch.nbytes)  # the file itself is read ahead
                first += len(batch)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read as a table, after row {first - 1:,}: {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _header(path: str, columns: Columns) -> tuple[str, dict[str, str]]:
    """What divides the columns, and their names by role."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            line = stream.readline()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read as a table in UTF-8: {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if not line.strip():
        raise ValueError(f"{path}: the first line, which names the columns, is empty")
    delimiter = "\t" if path.endswith(".tsv") else max(",\t;|", key=line.count)
    return delimiter, columns.found(path, next(csv.reader([line], delimiter=delimiter)))


def read_lines(path: str, columns: Columns) -> Iterator[Rows]:
    """The lines of a JSON Lines file, an object in each, counted from 1.

    Raises:
        ValueError: if a line is no object or lacks a column, or a column's values are not of one type.
    """
    found: dict[str, str] = {}
    first = 1
    try:
        with open(path, encoding="utf-8-sig") as stream:
            while lines := list(islice(stream, _LINES_AT_ONCE)):
                objects = [_object(path, first + i, line) for i, line in enumerate(lines)]
                found = found or columns.found(f"{path} line 1", list(objects[0]))
                cells = {
                    role: _column(path, first, name, [value.get(name) for value in objects])
                    for role, name in found.items()
                }
                yield Rows(path, first, cells, typed=True, size=sum(map(len, lines)), word="line")
                first += len(lines)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read as UTF-8, after line {first - 1:,}: {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {os.strerror(error.errno or 0)}") from error


def _object(path: str, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        what = f"is no JSON: {error}" if line.strip() else "is empty: remove it"
        raise ValueError(f"{path} line {number:,} {what}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} line {number:,}: an object is needed ({{...}}), not {line.strip()[:40]!r}")
    return value


def _column(path: str, first: int, name: str, values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        pass
    kind = type(next(value for value in values if value is not None))
    row = next((i for i, value in enumerate(values) if value is not None and type(value) is not kind), 0)
    raise ValueError(
        f"{path} line {first + row:,}: {str(values[row])[:40]!r} in {name!r} is of another type than those before, which are"
        f" {kind.__name__}; bring all to one"
    )
