"""Where labelled texts come from: the reader of each kind of data, and which of them a path is for."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bigmodel.cache import digest, file_hashes
from bigmodel.tasks.transfer_learning.sources.columns import Columns, Part, Rows, Source, split_in
from bigmodel.tasks.transfer_learning.sources.examples import find_named
from bigmodel.tasks.transfer_learning.sources.huggingface import HUB, hub_files, is_saved, parts_of, saved_files
from bigmodel.tasks.transfer_learning.sources.parquet import read_parquet
from bigmodel.tasks.transfer_learning.sources.text import read_lines, read_table

__all__ = ["Columns", "Source", "find_source"]

KINDS = (
    "tables of texts (CSV, TSV, JSON Lines, Parquet; files, a folder or a glob); a data set saved by Hugging Face datasets,"
    " or hf://owner/name (hf://owner/name:configuration); {fine_foods}"
)
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


def find_source(path: str | list[str], *, columns: Columns, cache: Path) -> Source:
    """The texts at a path, unread.

    Args:
        path: files, folders or globs, all of one data set; hf://owner/name; or a name in braces. Files whose names say
            train, validation or test are these splits, unless a column says it.
        columns: names of a table's columns.
        cache: folder of the task, which remembers the hashes of files.

    Raises:
        ValueError: if there is nothing at the path, or of no known kind, or some files are of splits and others of none.
    """
    if isinstance(path, str) and path.startswith("{") and path.endswith("}"):
        return find_named(path, columns)
    where = path if isinstance(path, str) else ", ".join(path)
    if isinstance(path, str) and path.startswith(HUB):
        found = hub_files(path)
        parts, files = parts_of(path, found, columns), [file for some in found.values() for file in some]
    elif isinstance(path, str) and os.path.isdir(folder := os.path.expanduser(path)) and is_saved(folder):
        found = saved_files(folder)
        parts, files = parts_of(path, found, columns), [file for some in found.values() for file in some]
    else:
        given = [path] if isinstance(path, str) else path
        files = list(dict.fromkeys(file for one in given for file in _files(one)))
        if not files:
            raise ValueError(f"--data.path {path}: nothing is given. Known are {KINDS}")
        parts = [_part(file, columns) for file in files]
    left_out: list[str] = []
    if columns.split is None and columns.label is not None and any(part.split == "train" for part in parts):
        left_out = [part.where for part in parts if part.split is None]
        if left_out and not isinstance(path, str):
            raise ValueError(
                f"--data.path: the names of some files say which split they are, but not those of {left_out}: rename them"
                " (train, validation, test), or set --data.split_column"
            )
        parts = [part for part in parts if part.split is not None]
    hashes = file_hashes(files, cache)
    # How a text is read depends on its name too.
    return Source(where, digest([hashes, [part.split for part in parts], *map(_suffix, files)]), parts, left_out)


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1]


def _files(given: str) -> list[str]:
    """The files that are meant, in order."""
    place = os.path.expanduser(given)
    if os.path.isfile(place):
        return [place]
    if os.path.isdir(place):
        found = {
            suffix: sorted(glob.glob(os.path.join(glob.escape(place), f"*{suffix}")))
            or sorted(glob.glob(os.path.join(glob.escape(place), "data", f"*{suffix}")))
            for suffix in _SUFFIXES
        }
        kinds = [suffix for suffix in _SUFFIXES if found[suffix]]
        if len(kinds) > 1:
            some = [found[kind][0] for kind in kinds]
            raise ValueError(f"--data.path {given}: tables of several kinds, such as {some}; give the files")
        if not kinds:
            raise ValueError(f"--data.path {given}: no table in the folder. Known are {KINDS}")
        return found[kinds[0]]
    if glob.has_magic(place):
        files = sorted(file for file in glob.glob(place, recursive=True) if os.path.isfile(file))
        if not files:
            raise ValueError(f"--data.path {given}: no file matches")
        return files
    raise ValueError(f"--data.path {given}: no such file or folder ({os.path.abspath(place)}). Known are {KINDS}")


def _part(path: str, columns: Columns) -> Part:
    read: Callable[[str, Columns], Iterator[Rows]] = _reader(path)
    return Part(path, split_in(Path(path).stem), partial(read, path, columns), os.path.getsize(path))


def _reader(path: str) -> Callable[[str, Columns], Iterator[Rows]]:
    try:
        with open(path, "rb") as stream:
            head = stream.read(2**12)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if not head:
        raise ValueError(f"{path} is empty")
    if head.startswith(b"PAR1"):
        return read_parquet
    if b"\0" in head or head.startswith(b"\x1f\x8b"):
        raise ValueError(f"{path}: a file of no known kind. Known are {KINDS}")
    return read_lines if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") else read_table
