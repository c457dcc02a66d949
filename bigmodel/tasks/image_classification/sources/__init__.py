"""Sources of images: the format at a path is recognised by content and structure."""

from __future__ import annotations

import glob
import os
import tarfile
import zipfile
from pathlib import Path

from bigmodel.data.tables.hugging_face import HUB, is_saved
from bigmodel.tasks.image_classification.batch import ImageSource
from bigmodel.tasks.image_classification.sources.arrays import read_npz
from bigmodel.tasks.image_classification.sources.cifar import cifar_archives, is_cifar, read_cifar
from bigmodel.tasks.image_classification.sources.columns import ImageColumns
from bigmodel.tasks.image_classification.sources.dataset_index import KINDS, RawDataset, to_source
from bigmodel.tasks.image_classification.sources.examples import read_named
from bigmodel.tasks.image_classification.sources.folder import read_folder
from bigmodel.tasks.image_classification.sources.huggingface import read_hub, read_saved
from bigmodel.tasks.image_classification.sources.idx import idx_files, read_idx
from bigmodel.tasks.image_classification.sources.parquet import read_parquet
from bigmodel.tasks.image_classification.sources.table import read_table

__all__ = ["ImageColumns", "find_source"]


def find_source(path: str, *, columns: ImageColumns, cache: Path, labelled: bool = True) -> ImageSource:
    """Find the images at a path, with class numbers.

    Args:
        path: a file, folder, glob of Parquet files, hf://owner/name, or a name in braces; the format is recognised
            by the contents.
        columns: names of a table's columns.
        cache: folder of downloads and converted tables.
        labelled: False, for prediction: no labels are read; all images are in one split `all`, their labels -1.

    Raises:
        ValueError: if the path does not exist or has an unknown format; a file cannot be read; a label is missing or not
            one of the classes; or there are fewer than two classes.
    """
    return to_source(_find(path, columns, cache, labelled), labelled)


def _find(path: str, columns: ImageColumns, cache: Path, labelled: bool) -> RawDataset:
    if path.startswith("{") and path.endswith("}"):
        return read_named(path, cache, labelled)
    if path.startswith(HUB):
        return read_hub(path, columns, labelled)
    place = os.path.expanduser(path)
    if os.path.isdir(place):
        return _find_in_folder(place, columns, cache, labelled)
    if os.path.isfile(place):
        return _find_in_file(place, columns, cache, labelled)
    if glob.has_magic(place):
        files = sorted(file for file in glob.glob(place, recursive=True) if os.path.isfile(file))
        if not files:
            raise ValueError(f"--data.path {path}: no file matches")
        return read_parquet(path, files, columns, cache, labelled)
    raise ValueError(f"--data.path {path}: no such file or folder ({os.path.abspath(place)}). Accepted are {KINDS}")


def _find_in_folder(folder: str, columns: ImageColumns, cache: Path, labelled: bool) -> RawDataset:
    try:
        if is_saved(folder):
            return read_saved(folder, columns, labelled)
        if is_cifar(folder):
            return read_cifar(folder, labelled)
        if idx_files(folder):
            return read_idx(folder, labelled)
        archives = cifar_archives(folder)
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {error.strerror}") from error
    if len(archives) > 1:
        raise ValueError(f"--data.path {folder}: it holds several datasets; set it to one of {archives}")
    if archives:
        return read_cifar(archives[0], labelled)
    for below in ("*.parquet", "data/*.parquet"):
        if files := sorted(glob.glob(os.path.join(glob.escape(folder), below))):
            return read_parquet(folder, files, columns, cache, labelled)
    return read_folder(folder, labelled)


def _find_in_file(path: str, columns: ImageColumns, cache: Path, labelled: bool) -> RawDataset:
    try:
        with open(path, "rb") as stream:
            head = stream.read(2**12)
        archive = tarfile.is_tarfile(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if head.startswith(b"PAR1"):
        return read_parquet(path, [path], columns, cache, labelled)
    if archive:
        return read_cifar(path, labelled)
    if zipfile.is_zipfile(path):
        return read_npz(path, labelled)
    if b"\0" not in head and not head.startswith(b"\x1f\x8b"):
        return read_table(path, columns, labelled)
    raise ValueError(f"--data.path {path}: unknown file format. Accepted are {KINDS}")
