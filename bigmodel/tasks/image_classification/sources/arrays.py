"""Images in arrays: accepted shapes and types, and .npz files of them.

N images, H and W pixels, C channels (1, 3 or 4).
"""

from __future__ import annotations

import os
import zipfile
import zlib

import numpy as np

from bigmodel.data.cache import say
from bigmodel.tasks.image_classification.sources.dataset_index import Labels, RawDataset, RawSplit
from bigmodel.tasks.image_classification.sources.image_storage import ArrayStore

# Members of an .npz: Keras's names, MedMNIST's, and those of data without splits.
_PAIRS = {
    "train": (("x_train", "y_train"), ("train_images", "train_labels")),
    "val": (("x_val", "y_val"), ("val_images", "val_labels")),
    "test": (("x_test", "y_test"), ("test_images", "test_labels")),
    "all": (("images", "labels"), ("x", "y")),
}


def read_npz(path: str, labelled: bool) -> RawDataset:
    """Read images and labels of an .npz file into memory.

    Names: x_train and y_train, x_val, x_test; train_images and train_labels, ...; or images and labels, x and y.

    Raises:
        ValueError: if it is damaged, holds Python objects, none of these names, or arrays that `check_images` or
            `check_labels` rejects.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            members = {name.lower(): name for name in file.files}
            splits: dict[str, RawSplit] = {}
            for split, pairs in _PAIRS.items():
                for images_name, labels_name in pairs:
                    if images_name not in members:
                        continue
                    where = f"{path} {members[images_name]}"
                    if split in splits or (split == "all" and splits):
                        raise ValueError(
                            f"{where}: the file has images of {', '.join(splits)} too; accepted is one pair of names"
                        )
                    if labelled and labels_name not in members:
                        raise ValueError(f"{where} has no labels: {labels_name} is missing; there are {file.files}")
                    images = check_images(_load(file, members[images_name], path), where)
                    labels = None
                    if labelled:
                        name = members[labels_name]
                        labels = check_labels(_load(file, name, path), len(images), f"{path} {name}")
                    splits[split] = RawSplit(
                        ArrayStore(images, f"{os.path.basename(path)} {members[images_name]}"), labels
                    )
            if not splits:
                known = ", ".join(images for pairs in _PAIRS.values() for images, _ in pairs)
                raise ValueError(f"--data.path {path}: no images among {file.files}; accepted are {known}")
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return RawDataset(path, splits)


def _load(file: np.lib.npyio.NpzFile, name: str, path: str) -> np.ndarray:
    try:
        array: np.ndarray = file[name]
    except ValueError as error:
        raise ValueError(f"{path} {name} cannot be read: {error}. Save it as numbers or strings") from error
    return array


def check_images(array: np.ndarray, where: str) -> np.ndarray:
    """Return images [N, H, W] or [N, H, W, C] of uint8 or uint16, from such an array or from [N, C, H, W]."""
    if array.dtype.kind == "f":
        raise ValueError(
            f"{where} is of type {array.dtype}; images are uint8 or uint16. Convert values from 0 to 1 by"
            " (x * 255).round().astype('uint8')"
        )
    if array.dtype.newbyteorder("=") not in (np.uint8, np.uint16):
        raise ValueError(f"{where} is of type {array.dtype}; images are uint8 or uint16")
    shape, last = array.shape, array.shape[-1] if array.ndim else 0
    if array.ndim not in (3, 4) or 0 in shape[1:]:
        raise ValueError(f"{where} has the shape {list(shape)}; images are [N, H, W] or [N, H, W, 1, 3 or 4]")
    if array.ndim == 4 and last not in (1, 3, 4):
        if shape[1] not in (1, 3):
            raise ValueError(
                f"{where} has the shape {list(shape)}: neither the last nor the second is a number of channels (1, 3, 4)"
            )
        say(f"{where}: {list(shape)} is read as [N, C, H, W]")
        array = array.transpose(0, 2, 3, 1)  # [N, C, H, W] -> [N, H, W, C]
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))


def check_labels(array: np.ndarray, num_images: int, where: str) -> Labels:
    """Return labels [N], integers or strings, from [N] or [N, 1]."""
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]  # [N, 1] -> [N]
    if array.ndim != 1:
        raise ValueError(
            f"{where} has the shape {list(array.shape)}; labels are [N] or [N, 1], one class an image (of one-hot rows"
            " take the argmax)"
        )
    if len(array) != num_images:
        raise ValueError(f"{where} has {len(array):,} labels, but there are {num_images:,} images")
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8")
    if array.dtype.kind == "U":
        names: list[str] = array.tolist()
        if "" in names:
            raise ValueError(f"{where} row {names.index('')}: the label is empty")
        return names
    if array.dtype.kind not in "iu":
        raise ValueError(f"{where} is of type {array.dtype}; labels are integers or strings")
    if len(array) and array.min() < 0:
        row = int(np.argmax(array < 0))
        raise ValueError(f"{where} row {row}: label {array[row]} is negative; class numbers start at 0")
    return array.astype(np.int64)
