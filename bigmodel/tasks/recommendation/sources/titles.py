"""Titles of items, in files of MovieLens and RecBole in the same folder as the events. All values are strings."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence

import pyarrow as pa

_SCHEMA = pa.schema({"id": pa.string(), "title": pa.string(), "genres": pa.string()})


def find_titles(path: str) -> pa.Table | None:
    """Read titles and genres from the folder of a file of events; None if there are none.

    Raises:
        ValueError: if a file of titles cannot be read.
    """
    folder = os.path.dirname(path)
    readers = {"u.item": _movielens_100k, "movies.dat": _movielens_1m, "movies.csv": _movielens_25m}
    if path.endswith(".inter"):
        readers = {os.path.basename(path).removesuffix(".inter") + ".item": _recbole}
    for name, reader in readers.items():
        if os.path.isfile(file := os.path.join(folder, name)):
            try:
                return reader(file)
            except (OSError, ValueError, IndexError) as error:
                raise ValueError(f"titles of {path}: {file} cannot be read: {error}") from error
    return None


def _table(rows: Iterable[Sequence[str | None]]) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [(), (), ()]
    return pa.table([pa.array(column, pa.string()) for column in columns], schema=_SCHEMA)


def _lines(path: str, encoding: str) -> list[str]:
    with open(path, encoding=encoding) as stream:
        return [line.rstrip("\n") for line in stream if line.strip()]


def _movielens_100k(path: str) -> pa.Table:
    """id|title|date|video date|address|19 flags of genres, whose names are in u.genre."""
    file = os.path.join(os.path.dirname(path), "u.genre")
    names = [line.split("|")[0] for line in _lines(file, "latin-1")] if os.path.isfile(file) else []
    rows = []
    for line in _lines(path, "latin-1"):
        cells = line.split("|")
        genres = [name for name, flag in zip(names, cells[5:], strict=False) if flag == "1"]
        rows.append((cells[0], cells[1], "|".join(genres) or None))
    return _table(rows)


def _movielens_1m(path: str) -> pa.Table:
    """id::title::genres, in Latin-1 (the 10M in UTF-8)."""
    try:
        lines = _lines(path, "utf-8")
    except UnicodeDecodeError:
        lines = _lines(path, "latin-1")
    rows = [line.split("::") for line in lines]
    return _table((cells[0], cells[1], cells[2]) for cells in rows)


def _movielens_25m(path: str) -> pa.Table:
    """movieId,title,genres with a line of names."""
    with open(path, encoding="utf-8-sig", newline="") as stream:
        return _table((row["movieId"], row["title"], row["genres"]) for row in csv.DictReader(stream))


def _recbole(path: str) -> pa.Table | None:
    """item_id:token, a column that ends in title, one of genre, genres, class."""
    header, *lines = _lines(path, "utf-8-sig")
    names = [name.split(":")[0] for name in header.split("\t")]
    title = next((i for i, name in enumerate(names) if name.endswith("title")), None)
    genres = next((i for i, name in enumerate(names) if name in ("genre", "genres", "class")), None)
    if title is None:
        return None
    item = names.index("item_id")
    rows = [line.split("\t") for line in lines]
    return _table((cells[item], cells[title], None if genres is None else cells[genres]) for cells in rows)
