"""Sources of labelled texts: the reader of each format, and the choice by path."""

from __future__ import annotations

import os
from functools import partial
from itertools import chain
from pathlib import Path

from bigmodel.data.cache import digest, file_hashes
from bigmodel.data.split_shares import split_in
from bigmodel.data.tables import files_in, find_files, read_table
from bigmodel.data.tables.arrow import read_arrow
from bigmodel.data.tables.files import kind_of
from bigmodel.data.tables.hugging_face import HUB, hub_files, is_saved, saved_files
from bigmodel.tasks.transfer_learning.sources.columns import SourcePart, TextColumns, TextSource
from bigmodel.tasks.transfer_learning.sources.examples import find_named

__all__ = ["TextColumns", "TextSource", "find_source"]

KINDS = (
    "tables of texts (CSV, TSV, JSON Lines, Parquet; files, a folder or a glob); a data set saved by Hugging Face datasets,"
    " or hf://owner/name (hf://owner/name:configuration); {fine_foods}"
)
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


def find_source(path: str | list[str], *, columns: TextColumns, cache: Path) -> TextSource:
    """Find the texts at a path, without reading them.

    Args:
        path: files, folders or globs, all of one dataset; hf://owner/name; or a name in braces. Files named train,
            validation or test are these splits, unless there is a split column.
        columns: names of a table's columns.
        cache: folder of the task, where hashes of files are cached.

    Raises:
        ValueError: if there is nothing at the path, or of an unknown format, or only some files are of splits.
    """
    if isinstance(path, str) and path.startswith("{") and path.endswith("}"):
        return find_named(path, columns)
    where = path if isinstance(path, str) else ", ".join(path)
    if isinstance(path, str) and (splits := _of_hugging_face(path)):
        files = list(chain.from_iterable(splits.values()))
        parts = [_split(f"{path} {split}", split, paths, columns) for split, paths in splits.items()]
    else:
        files = find_files(path, partial(files_in, suffixes=_SUFFIXES), KINDS)
        parts = [_part(file, columns) for file in files]
    left_out: list[str] = []
    if columns.split is None and columns.label is not None and any(part.split == "train" for part in parts):
        left_out = [part.where for part in parts if part.split is None]
        if left_out and not isinstance(path, str):
            raise ValueError(
                f"--data.path: some file names contain a split, but not those of {left_out}: rename them (train,"
                " validation, test), or set --data.split_column"
            )
        parts = [part for part in parts if part.split is not None]
    hashes = file_hashes(files, cache)
    # The format of a text depends on its name too.
    suffixes = [os.path.splitext(file)[1] for file in files]
    return TextSource(where, digest([hashes, [part.split for part in parts], *suffixes]), parts, left_out)


def _of_hugging_face(path: str) -> dict[str, list[str]]:
    """Return the files of each split, if the folder is a dataset of Hugging Face."""
    if path.startswith(HUB):
        return hub_files(path, "its Parquet files, or the folder that Dataset.save_to_disk wrote elsewhere")
    folder = os.path.expanduser(path)
    return saved_files(folder) if os.path.isdir(folder) and is_saved(folder) else {}


def _split(where: str, split: str, paths: list[str], columns: TextColumns) -> SourcePart:
    return SourcePart(
        where, split_in(split), partial(read_arrow, where, paths, columns), sum(map(os.path.getsize, paths))
    )


def _part(path: str, columns: TextColumns) -> SourcePart:
    kind_of(path, KINDS)  # check the format before any is read
    return SourcePart(path, split_in(Path(path).stem), partial(read_table, path, columns), os.path.getsize(path))
