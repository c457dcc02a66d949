"""Stores of images: files, one flat file, Arrow tables, arrays; selections and concatenations of them.

Each satisfies `ImageStore`. Rows are counted from 0, as by the libraries that read these formats.

N images, H and W pixels, C channels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bigmodel.data.cache import digest
from bigmodel.data.checksums import compare_checksums
from bigmodel.tasks.image_classification.batch import ImageStore

BYTES_FILE = "pictures.bin"  # of `PackedStore`


def file_stamp(path: str | os.PathLike[str]) -> list[str | int]:
    """Return absolute path, size in bytes, time of last change in ns; of a missing file only the path."""
    try:
        stat = os.stat(path)
    except OSError:  # the error of reading it is more precise
        return [os.path.abspath(path)]
    return [os.path.abspath(path), stat.st_size, stat.st_mtime_ns]


class FileStore:
    """One file per image. The names are stored in one string of bytes, which is small and fast to pickle.

    Args:
        root: folder that the names are relative to.
        names: [N] paths below the root, or absolute.
    """

    def __init__(self, root: str, names: Sequence[str]) -> None:
        self.given, self.root = root, os.path.abspath(root)
        encoded = [os.fsencode(name) for name in names]
        self._text = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def _below(self, i: int) -> str:
        return os.fsdecode(self._text[self._ends[i] : self._ends[i + 1]])

    def path(self, i: int) -> str:
        return os.path.join(self.root, self._below(i))

    def name(self, i: int) -> str:
        return os.path.join(self.given, self._below(i))

    def read(self, i: int) -> bytes:
        with open(self.path(i), "rb") as stream:
            return stream.read()

    def stamp(self, i: int) -> list[str | int]:
        return file_stamp(self.path(i))


class PackedStore:
    """Encoded images, concatenated in a memory-mapped file of a folder::

        pictures.bin    the bytes (an earlier name, so that existing folders can be read)
        ends.npy        [N + 1] int64: image i is bytes ends[i] to ends[i + 1]
        files.json      [[name, rows], ...]: their source tables, in order

    Args:
        folder: its name is a hash of its content.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        compare_checksums(folder)
        self._ends = np.load(folder / "ends.npy", mmap_mode="r")
        self._bytes = np.memmap(folder / BYTES_FILE, np.uint8, "r")
        if len(self._bytes) != self._ends[-1]:
            raise ValueError(
                f"{folder} is damaged: {len(self._bytes):,} bytes, not {self._ends[-1]:,}. Delete it and start again"
            )
        files = json.loads((folder / "files.json").read_text(encoding="utf-8"))
        self._files = [name for name, _ in files]
        self._starts = np.cumsum([0, *(rows for _, rows in files)])

    def __reduce__(self) -> tuple[type[PackedStore], tuple[Path]]:
        return PackedStore, (self.folder,)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def name(self, i: int) -> str:
        file = int(np.searchsorted(self._starts, i, side="right")) - 1
        return f"{self._files[file]} row {i - self._starts[file]}"

    def read(self, i: int) -> bytes:
        return self._bytes[self._ends[i] : self._ends[i + 1]].tobytes()

    def stamp(self, i: int) -> list[str | int]:
        return [self.folder.name, i]


class ArrowStore:
    """An image column of memory-mapped Arrow stream files, the format of Hugging Face's datasets. Pickled as paths.

    Args:
        files: in order.
        column: of binary, or of struct<bytes, path>: the file at the path is read where there are no bytes. Without
            nulls.
        what: the dataset's name, for `name`.
    """

    def __init__(self, files: Sequence[str], column: str, what: str) -> None:
        self.files, self.column, self.what = list(files), column, what
        self._chunks = open_arrow(files).column(column).chunks
        self._starts = np.cumsum([0, *map(len, self._chunks)])
        self._key = digest([[file_stamp(file) for file in self.files], column])

    def __reduce__(self) -> tuple[type[ArrowStore], tuple[list[str], str, str]]:
        return ArrowStore, (self.files, self.column, self.what)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def name(self, i: int) -> str:
        return f"{self.what} row {i}"

    def _content(self, i: int) -> Any:
        """Return a scalar of the image's bytes, or of its path."""
        chunk = int(np.searchsorted(self._starts, i, side="right")) - 1
        value = self._chunks[chunk][i - self._starts[chunk]]
        if pa.types.is_struct(value.type):
            return value["bytes"] if value["bytes"].is_valid else value["path"]
        return value

    def read(self, i: int) -> bytes:
        content = self._content(i).as_py()
        return content if isinstance(content, bytes) else Path(content).read_bytes()

    def stamp(self, i: int) -> list[str | int]:
        content = self._content(i)
        return file_stamp(content.as_py()) if pa.types.is_string(content.type) else [self._key, i]


def open_arrow(files: Sequence[str]) -> pa.Table:
    """Open Arrow stream files as a memory-mapped table.

    Raises:
        ValueError: if one cannot be read.
    """
    tables = []
    for file in files:
        try:
            tables.append(pa.ipc.open_stream(pa.memory_map(file)).read_all())
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(f"{file} cannot be read as Arrow: {error}") from error
    return pa.concat_tables(tables)


class ArrayStore:
    """Images in an array in memory.

    Args:
        array: [N, H, W] or [N, H, W, C], uint8 or uint16.
        what: the array's name, for `name`.
    """

    def __init__(self, array: np.ndarray, what: str) -> None:
        self.array, self.what = array, what

    def __len__(self) -> int:
        return len(self.array)

    def name(self, i: int) -> str:
        return f"{self.what} {i}"

    def read(self, i: int) -> np.ndarray:
        return self.array[i]

    def stamp(self, i: int) -> list[str | int]:
        return []


class ConcatStore:
    """The images of several stores, concatenated."""

    def __init__(self, stores: Sequence[ImageStore]) -> None:
        self.stores = list(stores)
        self._starts = np.cumsum([0, *map(len, self.stores)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _place(self, i: int) -> tuple[ImageStore, int]:
        store = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self.stores[store], i - int(self._starts[store])

    def name(self, i: int) -> str:
        store, row = self._place(i)
        return store.name(row)

    def read(self, i: int) -> bytes | np.ndarray:
        store, row = self._place(i)
        return store.read(row)

    def stamp(self, i: int) -> list[str | int]:
        store, row = self._place(i)
        return store.stamp(row)


class SubsetStore:
    """A selection of images of a store.

    Args:
        store: has them.
        rows: [N] int64, their numbers.
    """

    def __init__(self, store: ImageStore, rows: np.ndarray) -> None:
        self.store, self.rows = store, rows

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> str:
        return self.store.name(int(self.rows[i]))

    def read(self, i: int) -> bytes | np.ndarray:
        return self.store.read(int(self.rows[i]))

    def stamp(self, i: int) -> list[str | int]:
        return self.store.stamp(int(self.rows[i]))
