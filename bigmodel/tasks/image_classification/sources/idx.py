"""MNIST's file format, also of Fashion-MNIST and KMNIST: big-endian IDX, as described by LeCun, Cortes and Burges.

A magic number (2051: images, 2049: labels), the size of each dimension, all uint32; then the bytes.
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from pathlib import Path

import numpy as np

from bigmodel.tasks.image_classification.sources.dataset_index import RawDataset, RawSplit
from bigmodel.tasks.image_classification.sources.image_storage import ArrayStore

_IMAGES, _LABELS = 2051, 2049
_NAME = re.compile(r"(train|t10k)-(images|labels)[.-]idx[13]-ubyte(\.gz)?", re.IGNORECASE)


def idx_files(folder: str) -> dict[tuple[str, str], str]:
    """Return the files in a folder by (train or t10k, images or labels); of a file and its .gz, the file."""
    found = {}
    for name in sorted(os.listdir(folder), reverse=True):  # x.gz before x, which replaces it
        if match := _NAME.fullmatch(name):
            found[match[1].lower(), match[2].lower()] = os.path.join(folder, name)
    return found


def read_idx(folder: str, labelled: bool, classes: list[str] | None = None) -> RawDataset:
    """Read the splits train and test.

    Args:
        folder: holds {train,t10k}-{images-idx3,labels-idx1}-ubyte, perhaps with .gz, or a dot for the hyphen before idx.
        labelled: False: files of labels are not read.
        classes: names by class number, which the files do not contain.

    Raises:
        ValueError: if a file is missing, damaged, or does not have as many rows as its partner.
    """
    files = idx_files(folder)
    splits = {}
    for word, split in (("train", "train"), ("t10k", "test")):
        if (word, "images") not in files:
            if (word, "labels") in files:
                raise ValueError(f"--data.path {folder}: {word}-images-idx3-ubyte is missing")
            continue
        images = _read(files[word, "images"], _IMAGES)
        labels = None
        if labelled:
            if (word, "labels") not in files:
                raise ValueError(f"--data.path {folder}: {word}-labels-idx1-ubyte is missing")
            path = files[word, "labels"]
            labels = _read(path, _LABELS).astype(np.int64)
            if len(labels) != len(images):
                raise ValueError(f"{path} has {len(labels):,} labels, but there are {len(images):,} images")
        what = f"{os.path.basename(os.path.abspath(folder))}/{word}-images"
        splits[split] = RawSplit(ArrayStore(images, what), labels)
    return RawDataset(folder, splits, classes)


def _read(path: str, magic: int) -> np.ndarray:
    """Read images [N, H, W] or labels [N], uint8."""
    try:
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":  # whatever the suffix
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    num_dimensions = 3 if magic == _IMAGES else 1
    start = 4 * (1 + num_dimensions)
    if len(data) < start:
        raise ValueError(f"{path} is damaged: it has only {len(data)} bytes")
    number, *shape = (int(size) for size in np.frombuffer(data, ">u4", 1 + num_dimensions))
    if number != magic:
        raise ValueError(
            f"{path} starts with the number {number}, not {magic}: it is not an IDX file of images (2051) or labels (2049)"
        )
    expected = start + int(np.prod(shape))
    if len(data) != expected:
        raise ValueError(f"{path} is damaged: {len(data):,} bytes, not the {expected:,} of the shape {shape}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
