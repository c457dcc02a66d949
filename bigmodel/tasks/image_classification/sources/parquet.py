"""Parquet tables: labels are read from them; encoded images are copied once to a flat file with random access.

A page of Parquet is compressed as a whole, so a single image in it cannot be read. The copy is made in record batches;
memory use is that of a few pages, for files of any size::

    <cache>/tables/<hash of the files' paths, sizes, times of change, and the column>/    see `PackedStore`
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigmodel.data.cache import building, digest, disk_errors, progress, write_text
from bigmodel.data.checksums import write_checksums
from bigmodel.data.tables.arrow import class_names, open_parquet
from bigmodel.tasks.image_classification.batch import ImageStore
from bigmodel.tasks.image_classification.sources.columns import ImageColumns, holds_bytes, parts_found
from bigmodel.tasks.image_classification.sources.dataset_index import RawDataset, group_splits
from bigmodel.tasks.image_classification.sources.image_storage import BYTES_FILE, FileStore, PackedStore, file_stamp

_ROWS_AT_ONCE = 64  # of encoded images in memory


def read_parquet(where: str, paths: Sequence[str], columns: ImageColumns, cache: Path, labelled: bool) -> RawDataset:
    """Read images in Parquet files: struct<bytes, path> as Hugging Face writes it, binary, or strings (paths).

    Without a split column, splits are taken from file names, as on the Hugging Face hub (train-00000-of-00003.parquet).

    Args:
        where: the path that was given.
        paths: the files, in order.
        columns: their names.
        cache: folder of the copy.
        labelled: False: only the images are read.

    Raises:
        ValueError: if a file cannot be read, a column is missing or of a different type, or a cell is empty.
    """
    wanted = columns.wanted(labelled)
    schemas = []
    for path in paths:
        with open_parquet(path) as file:
            schemas.append(file.schema_arrow)
        columns.check(path, schemas[-1].names, wanted)
        for column in wanted:
            here, first = schemas[-1].field(column).type, schemas[0].field(column).type
            if here != first:
                raise ValueError(f"{path}: column {column!r} is of type {here}, but of {first} in {paths[0]}")

    named: dict[str, list[str]] = {}
    for path in paths:
        word = re.match("[a-zA-Z]*", os.path.basename(path))
        named.setdefault(word.group() if word else "", []).append(path)
    groups = group_splits(named, where, labelled and columns.split is None)
    parts = {}
    for split, words in groups.items():
        files = [path for word in words for path in named[word]]
        store = _store(files, columns.image, schemas[0].field(columns.image).type, cache)
        parts[split] = store, pa.concat_tables([_read(path, wanted[1:]) for path in files])
    return parts_found(where, parts, columns, labelled, class_names(schemas[0], columns.label))


def _read(path: str, names: list[str]) -> pa.Table:
    with open_parquet(path) as file:
        return file.read(names)


def _images(path: str, column: str) -> Iterator[pa.Array]:
    """Yield the bytes of a file's images, in blocks."""
    with open_parquet(path) as file:
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[column]):
            images = batch.column(0)
            yield pc.struct_field(images, "bytes") if pa.types.is_struct(images.type) else images


def _store(paths: list[str], column: str, kind: pa.DataType, cache: Path) -> ImageStore:
    if holds_bytes(kind):
        return _packed(paths, column, cache)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _files(paths, column)
    raise ValueError(
        f"{paths[0]}: column {column!r} is of type {kind}; images are struct<bytes, path>, binary, or strings (paths):"
        " set --data.columns.image to such a column"
    )


def _files(paths: list[str], column: str) -> FileStore:
    """Return the files named in a column of paths, absolute or below their table's folder."""
    names = []
    for path in paths:
        folder = os.path.dirname(path)
        for row, name in enumerate(_read(path, [column]).column(column).to_pylist()):
            image = os.path.join(folder, name or "")
            if not os.path.isfile(image):
                raise ValueError(f"{path} row {row}: the file {image} does not exist")
            names.append(image)
    return FileStore("", names)


def _packed(paths: list[str], column: str, cache: Path) -> PackedStore:
    final = cache / "tables" / digest([[file_stamp(path) for path in paths], column])
    if not final.exists():
        with building(final) as folder, disk_errors(cache, lambda: sum(map(os.path.getsize, paths))):
            _pack(paths, column, folder)
    return PackedStore(final)


def _pack(paths: list[str], column: str, folder: Path) -> None:
    ends, files = [0], []
    total = 0
    for path in paths:
        with open_parquet(path) as file:
            files.append((os.path.basename(path), file.metadata.num_rows))
            total += file.metadata.num_rows
    if total == 0:
        raise ValueError(f"{paths[0]}: the table has no rows")
    with (
        progress("copying images from Parquet", total, "images") as advance,
        open(folder / BYTES_FILE, "wb") as stream,
    ):
        for path in paths:
            row = 0
            for images in _images(path, column):
                for image in images:
                    if not image.is_valid or not (content := image.as_buffer()).size:
                        raise ValueError(
                            f"{path} row {row}: column {column!r} has no bytes of an image (for images in files, set"
                            " --data.columns.image to a column of paths)"
                        )
                    stream.write(content)
                    ends.append(ends[-1] + content.size)
                    row += 1
                advance(len(images))
        stream.flush()
        os.fsync(stream.fileno())
    np.save(folder / "ends.npy", np.array(ends, np.int64))
    write_text(folder / "files.json", json.dumps(files))
    write_checksums(folder)
