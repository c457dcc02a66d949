"""CSV or TSV tables: an image's path, its label, and optionally its split in each row; the first line is the header."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator

import numpy as np

from bigmodel.tasks.image_classification.sources.columns import ImageColumns, rows_of
from bigmodel.tasks.image_classification.sources.dataset_index import RawDataset, RawSplit
from bigmodel.tasks.image_classification.sources.image_storage import FileStore


def read_table(path: str, columns: ImageColumns, labelled: bool) -> RawDataset:
    """Read images named in a table, their paths absolute or below the table's folder.

    Raises:
        ValueError: if a column is missing or a cell is empty, or an image does not exist; names the line.
    """
    folder = os.path.dirname(path)
    wanted = columns.wanted(labelled)
    cells: dict[str, list[str]] = {column: [] for column in wanted}
    splits: list[str] = []
    for line, row in _rows(path, columns, wanted):
        for column in wanted:
            cell = (row[column] or "").strip()
            if not cell:
                raise ValueError(f"{path} line {line}: column {column!r} is empty")
            cells[column].append(cell)
        image = os.path.join(folder, cells[columns.image][-1])
        if not os.path.isfile(image):
            raise ValueError(f"{path} line {line}: the file {image} does not exist")
        if columns.split in wanted:
            splits.append(columns.parse_split(cells[columns.split][-1], f"{path} line {line}"))
    images = cells[columns.image]
    if not images:
        raise ValueError(f"--data.path {path}: the table has no rows")
    rows = rows_of(splits) if splits else {"all": np.arange(len(images))}
    return RawDataset(
        path,
        {
            split: RawSplit(
                FileStore(folder, [images[i] for i in chosen]),
                [cells[columns.label][i] for i in chosen] if labelled else None,
            )
            for split, chosen in rows.items()
        },
    )


def _rows(path: str, columns: ImageColumns, wanted: list[str]) -> Iterator[tuple[int, dict[str, str | None]]]:
    """Yield line numbers, as in an editor, and rows."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            header = stream.readline()
            stream.seek(0)
            reader = csv.DictReader(stream, delimiter=max(",\t;", key=header.count))
            columns.check(path, list(reader.fieldnames or []), wanted)
            for row in reader:
                yield reader.line_num, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a CSV or TSV table in UTF-8: {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
