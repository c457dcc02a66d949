"""Sources of events: the reader of each format, selected by path."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from bigmodel.data.cache import digest, file_hashes
from bigmodel.data.tables import Rows, files_in, find_files
from bigmodel.data.tables.arrow import read_parquet
from bigmodel.data.tables.files import kind_of
from bigmodel.data.tables.hugging_face import HUB
from bigmodel.data.tables.text import read_delimited, read_json_lines
from bigmodel.tasks.recommendation.sources.columns import InteractionColumns, InteractionSource
from bigmodel.tasks.recommendation.sources.examples import find_example
from bigmodel.tasks.recommendation.sources.huggingface import find_hub
from bigmodel.tasks.recommendation.sources.text import events_layout
from bigmodel.tasks.recommendation.sources.titles import find_titles

__all__ = ["InteractionColumns", "InteractionSource", "find_source"]

KINDS = (
    "tables of events (CSV, TSV, JSON Lines, Parquet; files, a folder or a glob); MovieLens as published (a folder with"
    " u.data, ratings.dat or ratings.csv); RecBole's .inter files; hf://owner/name; {movielens}"
)
_SUFFIXES = (".inter", ".parquet", ".csv", ".tsv", ".jsonl", ".inter.gz", ".csv.gz", ".tsv.gz")
_SPLIT_OF = {"train": "train", "valid": "val", "validation": "val", "val": "val", "dev": "val", "test": "test"}
_SPLIT_NAME = re.compile(rf"(?:^|[._-])({'|'.join(_SPLIT_OF)})(?:[._-]\d[\w-]*)?\.[a-z.]+$")
_ROWS_AT_ONCE = 2**19  # of Parquet: events are small


def find_source(path: str | list[str], *, columns: InteractionColumns, cache: Path) -> InteractionSource:
    """Find the events at a path, without reading them.

    Args:
        path: files, folders or globs, all of one dataset; hf://owner/name; or a name in braces.
        columns: names of a table's columns.
        cache: folder for cached hashes of files.

    Raises:
        ValueError: if the path does not exist, or its format is unknown.
    """
    if isinstance(path, str) and path.startswith("{") and path.endswith("}"):
        return find_example(path)
    if isinstance(path, str) and path.startswith(HUB):
        return find_hub(path, columns)
    files = find_files(path, _files_in, KINDS)
    kinds = {file: kind_of(file, KINDS) for file in files}

    def rows() -> Iterator[Rows]:
        for file in files:
            if kinds[file] == "parquet":
                yield from read_parquet(file, columns, _ROWS_AT_ONCE)
            elif kinds[file] == "json":
                yield from read_json_lines(file, columns)
            else:
                layout = events_layout(file, columns.column_names, columns.known)
                yield from read_delimited(file, layout, columns)

    def titles() -> pa.Table | None:
        tables = [table for file in files if (table := find_titles(file)) is not None]
        return pa.concat_tables(tables) if tables else None

    where = path if isinstance(path, str) else ", ".join(path)
    size = sum(os.path.getsize(file) for file in files)
    splits = _splits_of(files)
    content = _content(files, cache)
    content = content if splits is None else digest([content, *splits.values()])
    return InteractionSource(where, content, rows, titles, size, splits)


def _splits_of(files: list[str]) -> dict[str, str] | None:
    """Return the split of each file by its name, such as x.train.inter or valid.csv; None if none is for training.

    Raises:
        ValueError: if some are named by split, and others are not.
    """
    found = {file: match[1] for file in files if (match := _SPLIT_NAME.search(os.path.basename(file).lower()))}
    splits = {file: _SPLIT_OF[name] for file, name in found.items()}
    if len(set(splits.values())) < 2 or "train" not in splits.values():
        return None
    if others := [file for file in files if file not in splits]:
        raise ValueError(
            f"--data.path: {next(iter(splits))} is named by split, but {others[0]} is not: set it to files of one kind"
        )
    return splits


def _files_in(folder: str) -> list[str]:
    """Return the files of events in a folder."""
    path = os.path.expanduser(folder)
    names = os.listdir(path)
    movielens = [name for name in ("u.data", "ratings.dat", "ratings.csv") if name in names]
    if movielens == ["ratings.csv"] and "movies.csv" not in names:
        movielens = []  # other datasets may have this name
    if len(movielens) > 1:
        raise ValueError(
            f"--data.path {folder}: tables of several kinds, such as {movielens}; set it to the files of one kind"
        )
    return [os.path.join(path, name) for name in movielens] or files_in(folder, _SUFFIXES)


def _content(files: list[str], cache: Path) -> str:
    """Return the hash of the contents of the files, in their order, and of their titles; cached until a file changes."""
    titles = [
        os.path.join(os.path.dirname(file), name) for file in files for name in ("u.item", "movies.dat", "movies.csv")
    ]
    titles += [file.removesuffix(".inter") + ".item" for file in files if file.endswith(".inter")]
    paths = [*files, *(path for path in dict.fromkeys(titles) if os.path.isfile(path))]
    names = [os.path.basename(file) == "u.data" or file.endswith(".inter") for file in files]  # the format of a text
    return digest([*file_hashes(paths, cache), *names])
