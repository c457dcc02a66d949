"""Events in datasets of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator

from bigmodel.data.cache import digest, say
from bigmodel.data.tables import Rows
from bigmodel.data.tables.arrow import iter_blocks
from bigmodel.data.tables.hugging_face import load_hub
from bigmodel.tasks.recommendation.sources.columns import InteractionColumns, InteractionSource

_ROWS_AT_ONCE = 2**17


def find_hub(path: str, columns: InteractionColumns) -> InteractionSource:
    """Find a dataset of the hub; its splits are concatenated.

    Raises:
        ValueError: if `datasets` is not installed, or the dataset cannot be loaded.
    """
    loaded = load_hub(path, instead="its Parquet files")
    if len(loaded) > 1:
        say(f"{path}: the splits {', '.join(loaded)} are concatenated, and split again by --data.split")

    def rows() -> Iterator[Rows]:
        for split, data in loaded.items():
            tables = data.with_format("arrow").iter(_ROWS_AT_ONCE)
            batches = (batch for table in tables for batch in table.to_batches())
            yield from iter_blocks(f"{path} {split}", data.features.arrow_schema, batches, columns, _ROWS_AT_ONCE)

    from bigmodel.internals import fingerprint  # imports torch

    return InteractionSource(path, digest({split: fingerprint(data) for split, data in loaded.items()}), rows)
