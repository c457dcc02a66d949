"""Data sets of Hugging Face's `datasets`: saved to a folder, or of the hub. Their Arrow files are read in place."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from bigmodel.tasks.image_classification.pictures import Store
from bigmodel.tasks.image_classification.sources.columns import Columns, class_names, holds_bytes, parts_found
from bigmodel.tasks.image_classification.sources.found import Found, group_splits
from bigmodel.tasks.image_classification.sources.stores import Arrow, open_arrow

HUB = "hf://"


def is_saved(folder: str) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote the folder."""
    there = os.listdir(folder)
    return "dataset_dict.json" in there or {"state.json", "dataset_info.json"} <= set(there)


def read_saved(folder: str, columns: Columns, labelled: bool) -> Found:
    """A data set that was saved to a folder. `datasets` itself is not needed.

    Raises:
        ValueError: if a file of it is missing or damaged, or a column is missing or of another type.
    """
    try:
        if os.path.exists(os.path.join(folder, "dataset_dict.json")):
            names = json.loads(Path(folder, "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            splits = {name: _saved_files(os.path.join(folder, name)) for name in names}
        else:
            splits = {os.path.basename(os.path.abspath(folder)): _saved_files(folder)}
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"--data.path {folder}: not a whole data set of Hugging Face: {error}") from error
    return _found(folder, splits, columns, labelled)


def _saved_files(folder: str) -> list[str]:
    state = json.loads(Path(folder, "state.json").read_text(encoding="utf-8"))
    return [os.path.join(folder, file["filename"]) for file in state["_data_files"]]


def read_hub(path: str, columns: Columns, labelled: bool) -> Found:
    """A data set of the Hugging Face hub, kept where `datasets` keeps it ($HF_HOME).

    Raises:
        ValueError: if `datasets` is not installed, or the data set cannot be had.
    """
    if find_spec("datasets") is None:
        raise ValueError(f"--data.path {path} needs the package datasets: pip install datasets")
    import datasets

    name = path.removeprefix(HUB).strip("/")
    try:
        loaded = datasets.load_dataset(name)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ValueError(
            f"--data.path {path}: the data set {name} cannot be had from the hub: {error}. Where there is no network,"
            " give the folder that Dataset.save_to_disk wrote elsewhere"
        ) from error
    splits = {split: [file["filename"] for file in data.cache_files] for split, data in loaded.items()}
    return _found(path, splits, columns, labelled)


def _found(where: str, files: Mapping[str, list[str]], columns: Columns, labelled: bool) -> Found:
    parts: dict[str, tuple[Store, pa.Table]] = {}
    wanted = columns.wanted(labelled)
    classes = None
    for split, names in group_splits(files, where, labelled and columns.split is None).items():
        paths = [path for name in names for path in files[name]]
        if not paths:
            raise ValueError(f"--data.path {where}: no pictures in the split {split}")
        table = open_arrow(paths)
        columns.check(f"{where} {split}", table.column_names, wanted)
        kind = table.schema.field(columns.image).type
        if not holds_bytes(kind):
            raise ValueError(
                f"{where} {split}: column {columns.image!r} is of type {kind}; pictures are an Image feature or binary:"
                " set --data.columns.image to such a column"
            )
        store = Arrow(paths, columns.image, f"{os.path.basename(os.path.abspath(where))}/{split}")
        if (row := pc.index(_gaps(table.column(columns.image)), True).as_py()) >= 0:
            raise ValueError(f"{store.name(row)}: no picture in column {columns.image!r}")
        parts[split] = store, table.select(wanted[1:])
        classes = classes or class_names(table.schema, columns.label)
    return parts_found(where, parts, columns, labelled, classes)


def _gaps(pictures: pa.ChunkedArray) -> pa.ChunkedArray:
    """Whether there are neither bytes nor a path."""
    if not pa.types.is_struct(pictures.type):
        return pc.is_null(pictures)
    return pc.and_(*(pc.is_null(pc.struct_field(pictures, part)) for part in ("bytes", "path")))
