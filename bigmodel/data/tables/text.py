"""Text tables: CSV and TSV with a header line, other layouts of lines, JSON Lines.

In CSV, cells with line ends or delimiters are in double quotes. In a .tsv file a quote is an ordinary character, as in its
definition (IANA, text/tab-separated-values).
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.csv

from bigmodel.data.tables.arrow import read_parquet
from bigmodel.data.tables.files import kind_of, open_binary
from bigmodel.data.tables.rows import ColumnSelector, Rows

_BLOCK_BYTES = 4 * 2**20  # larger than any row; about ten blocks are read ahead
_LINES_AT_ONCE = 2**12


def read_table(path: str, columns: ColumnSelector) -> Iterator[Rows]:
    """Yield the rows of a CSV, TSV, JSON Lines or Parquet file; see the reader of each.

    Raises:
        ValueError: if it is none of these, cannot be read, or lacks a column.
    """
    kind = kind_of(path)
    if kind == "parquet":
        return read_parquet(path, columns)
    return read_json_lines(path, columns) if kind == "json" else read_delimited(path, layout_of(path), columns)


@dataclass(frozen=True)
class Layout:
    """Layout of a text table.

    Args:
        delimiter: the character between columns.
        names: of the columns.
        header: True if the first line contains the names.
        quotes: True if cells may be in double quotes.
        lines: True if each line is a row, even within quotes; messages then give line numbers, as in an editor.
    """

    delimiter: str
    names: list[str]
    header: bool = True
    quotes: bool = True
    lines: bool = False


def layout_of(path: str, lines: bool = False) -> Layout:
    """Return the layout of a table with a header line.

    The delimiter is the most frequent of comma, tab, semicolon and bar in that line; with `lines` and none of
    these, a space. Spaces around names are removed.

    Raises:
        ValueError: if the header is empty, or the file cannot be read.
    """
    line = first_line(path)
    if path.removesuffix(".gz").endswith(".tsv") and not lines:
        return Layout("\t", line.rstrip("\r\n").split("\t"), quotes=False)
    delimiter = max(",\t;|", key=line.count)
    if lines and delimiter not in line and " " in line.strip():
        delimiter, line = " ", line.strip()
    names = [name.strip() for name in next(csv.reader([line.rstrip("\r\n")], delimiter=delimiter))]
    return Layout(delimiter, names, lines=lines)


def first_line(path: str) -> str:
    """Return the first line, including its line end.

    Raises:
        ValueError: if it is empty, or cannot be read.
    """
    try:
        with io.TextIOWrapper(open_binary(path), encoding="utf-8-sig", newline="") as stream:
            line = stream.readline()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read as a table in UTF-8: {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not line.strip():
        raise ValueError(f"{path}: the first line is empty; it must contain the column names")
    return line


def read_delimited(path: str, layout: Layout, columns: ColumnSelector) -> Iterator[Rows]:
    """Yield the rows of a delimited text, all columns as text.

    Rows are numbered from 1 below the header; or with `layout.lines`, by line from 1. Empty lines are ignored.

    Raises:
        ValueError: if it cannot be read or lacks a column.
    """
    found = columns.select_columns(path, layout.names)
    kinds = dict.fromkeys(found.values(), pa.string())
    first, word = (1 + layout.header, "line") if layout.lines else (1, "row")
    locate = partial(_line_number, path) if layout.lines else None
    left = os.path.getsize(path)
    try:
        with open_binary(path) if path.endswith(".gz") else pa.OSFile(path) as file:
            reader = pyarrow.csv.open_csv(
                file,
                pyarrow.csv.ReadOptions(
                    block_size=_BLOCK_BYTES, column_names=layout.names, skip_rows=int(layout.header)
                ),
                pyarrow.csv.ParseOptions(
                    delimiter=layout.delimiter,
                    quote_char='"' if layout.quotes else False,
                    newlines_in_values=not layout.lines,
                ),
                pyarrow.csv.ConvertOptions(include_columns=list(kinds), column_types=kinds),
            )
            for batch in reader:
                size = min(left, _BLOCK_BYTES)  # the file itself is read ahead
                left -= size
                cells = {role: batch.column(name) for role, name in found.items()}
                yield Rows(path, first, cells, typed=False, size=size, word=word, locate=locate)
                first += len(batch)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read as a table, after {word} {first - 1:,}: {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _line_number(path: str, number: int) -> int:
    """Return the number, from 1, of the line that is this one, from 1, of those that are not empty."""
    with open_binary(path) as stream:
        filled = (line for line, text in enumerate(stream, 1) if text.strip(b"\r\n"))
        return next(islice(filled, number - 1, None), number)


def read_json_lines(path: str, columns: ColumnSelector) -> Iterator[Rows]:
    """Yield the objects of a JSON Lines file, numbered by line from 1.

    Raises:
        ValueError: if a line is not an object or lacks a column, or a column's values are not of one type.
    """
    found: dict[str, str] = {}
    first = 1
    try:
        with io.TextIOWrapper(open_binary(path), encoding="utf-8-sig") as stream:
            while lines := list(islice(stream, _LINES_AT_ONCE)):
                objects = [_object(path, first + i, line) for i, line in enumerate(lines)]
                found = found or columns.select_columns(f"{path} line 1", list(objects[0]))
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
        what = f"is not JSON: {error}" if line.strip() else "is empty: remove it"
        raise ValueError(f"{path} line {number:,} {what}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} line {number:,}: {line.strip()[:40]!r} is not a JSON object ({{...}})")
    return value


def _column(path: str, first: int, name: str, values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        pass
    kind = type(next(value for value in values if value is not None))
    row = next((i for i, value in enumerate(values) if value is not None and type(value) is not kind), 0)
    raise ValueError(
        f"{path} line {first + row:,}: {str(values[row])[:40]!r} in {name!r} differs in type from the values before"
        f" ({kind.__name__}); convert all to one type"
    )
