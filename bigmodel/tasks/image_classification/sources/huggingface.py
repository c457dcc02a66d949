"""Datasets of Hugging Face's `datasets`: saved to a folder, or from the hub. Their Arrow files are read in place."""

from __future__ import annotations

import os
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from bigmodel.data.tables.arrow import class_names
from bigmodel.data.tables.hugging_face import hub_files, saved_files
from bigmodel.tasks.image_classification.batch import ImageStore
from bigmodel.tasks.image_classification.sources.columns import ImageColumns, holds_bytes, parts_found
from bigmodel.tasks.image_classification.sources.dataset_index import RawDataset, group_splits
from bigmodel.tasks.image_classification.sources.image_storage import ArrowStore, open_arrow


def read_saved(folder: str, columns: ImageColumns, labelled: bool) -> RawDataset:
    """Read a dataset that was saved to a folder. `datasets` itself is not needed.

    Raises:
        ValueError: if a file of it is missing or damaged, or a column is missing or of a different type.
    """
    return _found(folder, saved_files(folder), columns, labelled)


def read_hub(path: str, columns: ImageColumns, labelled: bool) -> RawDataset:
    """Read a dataset of the Hugging Face hub, cached by `datasets` ($HF_HOME).

    Raises:
        ValueError: if `datasets` is not installed, or the dataset cannot be loaded.
    """
    files = hub_files(path, instead="the folder that Dataset.save_to_disk wrote elsewhere")
    return _found(path, files, columns, labelled)


def _found(where: str, files: Mapping[str, list[str]], columns: ImageColumns, labelled: bool) -> RawDataset:
    parts: dict[str, tuple[ImageStore, pa.Table]] = {}
    wanted = columns.wanted(labelled)
    classes = None
    for split, names in group_splits(files, where, labelled and columns.split is None).items():
        paths = [path for name in names for path in files[name]]
        if not paths:
            raise ValueError(f"--data.path {where}: no images in the split {split}")
        table = open_arrow(paths)
        columns.check(f"{where} {split}", table.column_names, wanted)
        kind = table.schema.field(columns.image).type
        if not holds_bytes(kind):
            raise ValueError(
                f"{where} {split}: column {columns.image!r} is of type {kind}; images are an Image feature or binary:"
                " set --data.columns.image to such a column"
            )
        store = ArrowStore(paths, columns.image, f"{os.path.basename(os.path.abspath(where))}/{split}")
        if (row := pc.index(_gaps(table.column(columns.image)), True).as_py()) >= 0:
            raise ValueError(f"{store.name(row)}: column {columns.image!r} is empty")
        parts[split] = store, table.select(wanted[1:])
        classes = classes or class_names(table.schema, columns.label)
    return parts_found(where, parts, columns, labelled, classes)


def _gaps(images: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a mask of rows with neither bytes nor a path."""
    if not pa.types.is_struct(images.type):
        return pc.is_null(images)
    return pc.and_(*(pc.is_null(pc.struct_field(images, part)) for part in ("bytes", "path")))
