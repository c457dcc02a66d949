"""Events in text: CSV and TSV with a line of names, RecBole's .inter with names and types, MovieLens without names."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.csv

from bigmodel.tasks.recommendation.sources.columns import Columns, Rows

_BLOCK_BYTES = 8 * 2**20
_MOVIELENS = ["user_id", "item_id", "rating", "timestamp"]


@dataclass(frozen=True)
class _Layout:
    """How a text is laid out: what divides its columns, what they are called, whether its first line says so."""

    delimiter: str
    names: list[str]
    header: bool
    quotes: bool = True


def _layout(path: str) -> _Layout:
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            line = stream.readline()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read as a table in UTF-8: {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if not line.strip():
        raise ValueError(f"{path}: the first line, which names the columns, is empty")
    if os.path.basename(path) == "u.data":  # MovieLens 100K
        return _Layout("\t", _MOVIELENS, header=False)
    if "::" in line:  # MovieLens 1M and 10M: with a single colon, each second column is empty
        names = [name for pair in zip(_MOVIELENS, ("-1", "-2", "-3", ""), strict=True) for name in pair][:-1]
        return _Layout(":", names, header=False, quotes=False)
    if path.endswith(".inter"):  # RecBole: user_id:token, rating:float, ...; neither quotes nor escapes
        return _Layout("\t", [name.split(":")[0] for name in line.rstrip("\r\n").split("\t")], True, quotes=False)
    delimiter = max(",\t;|", key=line.count)
    return _Layout(delimiter, next(csv.reader([line], delimiter=delimiter)), header=True)


def read_text(path: str, columns: Columns) -> Iterator[Rows]:
    """The lines of a text, counted from 1, as in an editor. All columns are text.

    Raises:
        ValueError: if it cannot be read or lacks a column.
    """
    layout = _layout(path)
    found = columns.found(path, layout.names)
    first = 1 + layout.header
    try:
        with pa.OSFile(path) as file:
            reader = pyarrow.csv.open_csv(
                file,
                pyarrow.csv.ReadOptions(
                    block_size=_BLOCK_BYTES, column_names=layout.names, skip_rows=int(layout.header)
                ),
                pyarrow.csv.ParseOptions(delimiter=layout.delimiter, quote_char='"' if layout.quotes else False),
                pyarrow.csv.ConvertOptions(
                    include_columns=list(found.values()), column_types=dict.fromkeys(found.values(), pa.string())
                ),
            )
            read = 0  # [bytes]
            for batch in reader:
                rows = {role: batch.column(name) for role, name in found.items()}
                size, read = file.tell() - read, file.tell()
                yield Rows(path, first, rows, typed=False, size=size, word="line")
                first += len(batch)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read as a table, after line {first - 1:,}: {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
