"""CIFAR-10 and CIFAR-100 as published (Krizhevsky 2009): the python or the binary version, unpacked or in its archive.

An image is 3072 bytes, its red, green and blue planes of 32 x 32. The python version is pickled; only arrays and plain
containers are unpickled, since a pickle may otherwise run anything.

N images.
"""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bigmodel.tasks.image_classification.sources.dataset_index import RawDataset, RawSplit
from bigmodel.tasks.image_classification.sources.image_storage import ArrayStore, ConcatStore

_PLANES = 3 * 32 * 32


@dataclass(frozen=True)
class _Version:
    """One published form.

    Attributes:
        name: of the dataset.
        train, test: the files of the splits.
        meta: the file of the class names.
        names_key: key of the names in it, if it is pickled.
        labels_key: key of the labels in the other files, if they are pickled.
        label_bytes: number of bytes before each image, if they are not pickled; the last is the class.
    """

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    names_key: str = ""
    labels_key: str = ""
    label_bytes: int = 0

    @property
    def files(self) -> set[str]:
        return {*self.train, *self.test, self.meta}


_VERSIONS = (
    _Version(
        "cifar-10",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        ("test_batch",),
        "batches.meta",
        "label_names",
        "labels",
    ),
    _Version("cifar-100", ("train",), ("test",), "meta", "fine_label_names", "fine_labels"),
    _Version(
        "cifar-10",
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        ("test_batch.bin",),
        "batches.meta.txt",
        label_bytes=1,
    ),
    _Version("cifar-100", ("train.bin",), ("test.bin",), "fine_label_names.txt", label_bytes=2),
)


def _version(names: Collection[str]) -> _Version | None:
    """Return the version of files with these names: its meta file and one more are among them."""
    for version in _VERSIONS:
        if version.meta in names and len(version.files & set(names)) > 1:
            return version
    return None


def _file_names(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if entry.is_file()]


def is_cifar(folder: str) -> bool:
    """True if the folder holds a published version, unpacked."""
    return _version(_file_names(folder)) is not None


def cifar_archives(folder: str) -> list[str]:
    """Return the published archives in a folder."""
    names = sorted(name for name in _file_names(folder) if name.startswith("cifar-10") and name.endswith(".tar.gz"))
    return [os.path.join(folder, name) for name in names]


def read_cifar(path: str, labelled: bool) -> RawDataset:
    """Read the splits train and test; the classes of CIFAR-100 are its 100 fine ones.

    Args:
        path: the folder of the unpacked files, or the archive. Nothing is unpacked to the disk.
        labelled: False: labels are not checked.

    Raises:
        ValueError: if a file is missing or damaged, or holds anything but arrays and plain containers.
    """
    files = _read_folder(path) if os.path.isdir(path) else _read_archive(path)
    version = _version(files)
    if version is None:
        raise ValueError(f"--data.path {path}: not CIFAR-10 or CIFAR-100; it has {sorted(files)[:10]}")
    if missing := sorted(version.files - set(files)):
        raise ValueError(f"--data.path {path}: {version.name} needs the files {missing}, which are missing")

    splits = {}
    for split, names in (("train", version.train), ("test", version.test)):
        parts = [_images(files.pop(name), version, f"{path} {name}") for name in names]
        stores = [ArrayStore(images, f"{version.name}/{name}") for name, (images, _) in zip(names, parts, strict=True)]
        labels = np.concatenate([labels for _, labels in parts]) if labelled else None
        splits[split] = RawSplit(stores[0] if len(stores) == 1 else ConcatStore(stores), labels)
    return RawDataset(path, splits, _classes(files[version.meta], version, f"{path} {version.meta}"))


def _read_folder(folder: str) -> dict[str, bytes]:
    version = _version(_file_names(folder))
    assert version is not None
    try:
        return {name: Path(folder, name).read_bytes() for name in _file_names(folder) if name in version.files}
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error


def _read_archive(path: str) -> dict[str, bytes]:
    """Return the files of any version in an archive, by name."""
    wanted = set().union(*(version.files for version in _VERSIONS))
    files = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = os.path.basename(member.name)
                if name in wanted and member.isfile():
                    stream = archive.extractfile(member)
                    assert stream is not None
                    files[name] = stream.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return files


def _images(data: bytes, version: _Version, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images [N, 32, 32, 3] uint8 and class numbers [N] int64."""
    if version.labels_key:
        content = _unpickle(data, where)
        planes, labels = _entry(content, "data", where), np.asarray(_entry(content, version.labels_key, where))
        if not isinstance(planes, np.ndarray) or planes.dtype != np.uint8 or planes.shape[1:] != (_PLANES,):
            raise ValueError(f"{where} is damaged: 'data' is not an array of uint8 of shape [N, {_PLANES}]")
        if labels.dtype.kind not in "iu" or labels.shape != planes.shape[:1]:
            raise ValueError(
                f"{where} is damaged: {version.labels_key!r} is not a list of {len(planes):,} class numbers"
            )
    else:
        width = version.label_bytes + _PLANES
        if len(data) % width:
            raise ValueError(
                f"{where} is damaged: {len(data):,} bytes are not a multiple of {width:,}, the bytes of an image"
            )
        records = np.frombuffer(data, np.uint8).reshape(-1, width)  # [N, labels and planes]
        labels, planes = records[:, version.label_bytes - 1], records[:, version.label_bytes :]
    images = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # [N, 3072] -> [N, C, H, W] -> [N, H, W, C]
    return np.ascontiguousarray(images), labels.astype(np.int64)


def _classes(data: bytes, version: _Version, where: str) -> list[str]:
    if version.names_key:
        return [str(name) for name in _entry(_unpickle(data, where), version.names_key, where)]
    return data.decode("utf-8", "replace").split()


def _entry(content: Any, key: str, where: str) -> Any:
    if not isinstance(content, dict) or key not in content:
        raise ValueError(f"{where} is damaged: it has no {key!r}")
    return content[key]


class _Unpickler(pickle.Unpickler):
    """Rebuilds numpy arrays and plain containers, and rejects everything else."""

    _reconstruct = np.empty(0).__reduce__()[0]
    allowed: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it contains {module}.{name}, which CIFAR does not")
        return self.allowed[module, name]


def _unpickle(data: bytes, where: str) -> Any:
    try:
        return _Unpickler(io.BytesIO(data), encoding="latin1").load()  # written by Python 2
    except Exception as error:  # damaged pickles raise nearly anything
        raise ValueError(f"{where} cannot be unpickled: {error}") from error
