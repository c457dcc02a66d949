"""Events in data sets of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from bigmodel.cache import digest, say
from bigmodel.tasks.recommendation.sources.columns import Columns, Rows, Source
from bigmodel.tasks.recommendation.sources.parquet import read_tables

HUB = "hf://"
_ROWS_AT_ONCE = 2**17


def find_hub(path: str, columns: Columns) -> Source:
    """A data set of the hub, kept where `datasets` keeps it ($HF_HOME); its splits are read one after the other.

    Raises:
        ValueError: if `datasets` is not installed, or the data set cannot be had.
    """
    if find_spec("datasets") is None:
        raise ValueError(f"--data.path {path} needs the package datasets: pip install 'bigmodel[hub]'")
    import datasets

    name = path.removeprefix(HUB).strip("/")
    try:
        loaded = datasets.load_dataset(name)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ValueError(
            f"--data.path {path}: the data set {name} cannot be had from the hub: {error}. Where there is no network,"
            " give its Parquet files"
        ) from error
    if len(loaded) > 1:
        say(f"{path}: the splits {', '.join(loaded)} are read as one; --data.split divides them anew")

    def rows() -> Iterator[Rows]:
        for split, data in loaded.items():
            yield from read_tables(f"{path} {split}", _tables(data), columns)

    return Source(path, digest({split: data._fingerprint for split, data in loaded.items()}), rows)


def _tables(data: Any) -> Iterator[Any]:
    yield from data.with_format("arrow").iter(_ROWS_AT_ONCE)
