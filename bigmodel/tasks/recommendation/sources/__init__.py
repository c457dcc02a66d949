"""Where events come from: the reader of each kind of data, and which of them a path is for."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from bigmodel.cache import digest, file_hashes
from bigmodel.tasks.recommendation.sources.columns import Columns, Rows, Source
from bigmodel.tasks.recommendation.sources.examples import find_named
from bigmodel.tasks.recommendation.sources.huggingface import HUB, find_hub
from bigmodel.tasks.recommendation.sources.parquet import read_parquet
from bigmodel.tasks.recommendation.sources.text import read_text
from bigmodel.tasks.recommendation.sources.titles import titles_beside

__all__ = ["Columns", "Source", "find_source"]

KINDS = (
    "tables of events (CSV, TSV, Parquet; files, a folder or a glob); MovieLens as published (a folder with u.data,"
    " ratings.dat or ratings.csv); RecBole's .inter files; hf://owner/name; {movielens}"
)
_PUBLISHED = {"u.data": "u.item", "ratings.dat": "movies.dat", "ratings.csv": "movies.csv"}  # MovieLens: events, titles
_SUFFIXES = (".inter", ".parquet", ".csv", ".tsv")


def find_source(path: str | list[str], *, columns: Columns, cache: Path) -> Source:
    """The events at a path, unread.

    Args:
        path: files, folders or globs, all of one data set; hf://owner/name; or a name in braces.
        columns: names of a table's columns.
        cache: folder of the task, which remembers the hashes of files.

    Raises:
        ValueError: if there is nothing at the path, or of no known kind.
    """
    if isinstance(path, str) and path.startswith("{") and path.endswith("}"):
        return find_named(path)
    if isinstance(path, str) and path.startswith(HUB):
        return find_hub(path, columns)
    files = list(dict.fromkeys(file for given in ([path] if isinstance(path, str) else path) for file in _files(given)))
    if not files:
        raise ValueError(f"--data.path {path}: nothing is given. Known are {KINDS}")
    parquet = {file: _is_parquet(file) for file in files}

    def rows() -> Iterator[Rows]:
        for file in files:
            yield from (read_parquet if parquet[file] else read_text)(file, columns)

    def titles() -> pa.Table | None:
        found = [titles_beside(file) for file in files]
        tables = [table for table in found if table is not None]
        return pa.concat_tables(tables) if tables else None

    where = path if isinstance(path, str) else ", ".join(path)
    size = sum(os.path.getsize(file) for file in files)
    return Source(where, _content(files, cache), rows, titles, size)


def _files(given: str) -> list[str]:
    """The files of events that are meant, in order."""
    place = os.path.expanduser(given)
    if os.path.isfile(place):
        return [place]
    if os.path.isdir(place):
        there = sorted(os.listdir(place))
        published = [events for events in _PUBLISHED if events in there]
        if published == ["ratings.csv"] and "movies.csv" not in there:
            published = []  # a name that anybody may give a table
        if len(published) == 1:
            return [os.path.join(place, published[0])]
        found = {suffix: [name for name in there if name.endswith(suffix)] for suffix in _SUFFIXES}
        kinds = [suffix for suffix in _SUFFIXES if found[suffix]]
        if len(kinds) > 1 or len(published) > 1:
            some = [found[kind][0] for kind in kinds]
            raise ValueError(f"--data.path {given}: tables of several kinds, such as {some}; give the files of events")
        if not kinds:
            raise ValueError(f"--data.path {given}: no file of events in the folder. Known are {KINDS}")
        return [os.path.join(place, name) for name in found[kinds[0]]]
    if glob.has_magic(place):
        files = sorted(file for file in glob.glob(place, recursive=True) if os.path.isfile(file))
        if not files:
            raise ValueError(f"--data.path {given}: no file matches")
        return files
    raise ValueError(f"--data.path {given}: no such file or folder ({os.path.abspath(place)}). Known are {KINDS}")


def _is_parquet(path: str) -> bool:
    try:
        with open(path, "rb") as stream:
            head = stream.read(2**12)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if not head:
        raise ValueError(f"{path} is empty")
    if head.startswith(b"PAR1"):
        return True
    if b"\0" in head or head.startswith(b"\x1f\x8b"):
        raise ValueError(f"{path}: a file of no known kind. Known are {KINDS}")
    return False


def _content(files: list[str], cache: Path) -> str:
    """Hash of the files' contents in their order, and of what lies beside them; remembered until a file changes."""
    beside = [
        os.path.join(os.path.dirname(file), name) for file in files for name in ("u.item", "movies.dat", "movies.csv")
    ]
    beside += [file.removesuffix(".inter") + ".item" for file in files if file.endswith(".inter")]
    paths = [*files, *(path for path in dict.fromkeys(beside) if os.path.isfile(path))]
    names = [os.path.basename(file) == "u.data" or file.endswith(".inter") for file in files]  # how a text is read, too
    return digest([*file_hashes(paths, cache), *names])
