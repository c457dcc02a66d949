"""Scan of every image: integrity, size, colour or grey, and a hash of its content.

Each image is read and decoded (a JPEG at an eighth of its size, which still processes all of its data) in worker
processes. The results are cached under the stamps of all images (names, sizes, dates), so a second start does not read
valid images again::

    <cache>/scans/<hash of the stamps>.npz      hashes, sizes and grey of a `Scan`; bad: [N] bool, true for errors

N images.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from zipfile import ZipFile

import numpy as np

from bigmodel.data.cache import disk_errors, progress
from bigmodel.data.image_decoding import ImageError, measure
from bigmodel.data.worker_pool import WorkerPool

if TYPE_CHECKING:
    from bigmodel.tasks.image_classification.batch import ImageStore

VERSION = 1  # of the cached results
BLOCK = 64  # images that a worker process takes at once

_KEY = b"bigmodel pictures"  # of the hash: it determines splits, so it must not change


class Scan(NamedTuple):
    """Scan results of N images.

    Attributes:
        hashes: [N, 16] uint8, BLAKE2b of the contents: of a file's bytes, or of shape and pixels.
        sizes: [N, 2] int32, height and width of the upright images.
        grey: [N] bool, True if all pixels are grey.
        errors: [N] of str, empty for a valid image, else the reason why it cannot be used.
    """

    hashes: np.ndarray
    sizes: np.ndarray
    grey: np.ndarray
    errors: np.ndarray


def scan(stores: Mapping[str, ImageStore], cache: Path, max_pixels: int, num_processes: int) -> dict[str, Scan]:
    """Scan the images of each store, or read the cached results.

    Args:
        stores: by the name of their split.
        cache: folder of the cached results.
        max_pixels: of an image; larger ones are errors.
        num_processes: worker processes.
    """
    cache_files = {name: _cache_file(store, cache, max_pixels) for name, store in stores.items()}
    scans = {name: _load_cached(cache_files[name], len(store)) for name, store in stores.items()}
    # Invalid images are scanned again: the cause may have been the disk, or the version of Pillow.
    rows = {name: np.flatnonzero(found.errors != "") for name, found in scans.items()}
    total = sum(map(len, rows.values()))
    if total == 0:
        return scans
    with (
        progress("checking images", total, "images") as advance,
        store_files(stores) as files,
        WorkerPool(min(num_processes, -(-total // BLOCK))) as workers,
    ):
        blocks = [(name, rows[name][i : i + BLOCK]) for name in stores for i in range(0, len(rows[name]), BLOCK)]
        found = workers.map(
            functools.partial(_scan_block, max_pixels), ((files[name], block) for name, block in blocks)
        )
        for (name, block), results in zip(blocks, found, strict=True):
            for column, values in zip(scans[name], results, strict=True):
                column[block] = values
            advance(len(block))
    for name, file in cache_files.items():
        if file is not None and len(rows[name]):
            _save(scans[name], file)
    return scans


@contextmanager
def store_files(stores: Mapping[str, ImageStore]) -> Iterator[dict[str, str]]:
    """Write files from which worker processes load the stores (`load_store`), once in each process."""
    with tempfile.TemporaryDirectory(prefix="bigmodel-") as folder:
        files = {name: os.path.join(folder, name) for name in stores}
        for name, store in stores.items():
            with open(files[name], "wb") as stream:
                pickle.dump(store, stream)
        yield files


@functools.lru_cache(maxsize=4)
def load_store(file: str) -> ImageStore:
    """Load a store from one of the `store_files`."""
    with open(file, "rb") as stream:
        store: ImageStore = pickle.load(stream)
    return store


def content_hash(content: bytes | np.ndarray) -> np.ndarray:
    """Return a hash [16] uint8 of the content of an image's file, or of its pixels."""
    digest = hashlib.blake2b(digest_size=16, key=_KEY)
    if isinstance(content, np.ndarray):
        digest.update(f"{content.dtype.kind}{content.dtype.itemsize}{list(content.shape)}".encode())
        digest.update(np.ascontiguousarray(content, content.dtype.newbyteorder("<")).data)
    else:
        digest.update(content)
    return np.frombuffer(digest.digest(), np.uint8)


def _scan_block(max_pixels: int, block: tuple[str, np.ndarray]) -> Scan:
    """Scan some images of a store; run in a worker process."""
    file, rows = block
    store = load_store(file)
    found = _empty(len(rows))
    for i, row in enumerate(rows.tolist()):
        try:
            content = store.read(row)
            height, width, found.grey[i] = measure(content, max_pixels)
            found.sizes[i] = height, width
            found.hashes[i] = content_hash(content)
            found.errors[i] = ""
        except ImageError as error:
            found.errors[i] = str(error)
        except OSError as error:
            found.errors[i] = f"the file cannot be read ({error.strerror or error})"
    return found


def _empty(n: int) -> Scan:
    """Return an empty result for n images."""
    return Scan(
        np.zeros((n, 16), np.uint8), np.zeros((n, 2), np.int32), np.zeros(n, bool), _unscanned(np.ones(n, bool))
    )


def _unscanned(rows: np.ndarray) -> np.ndarray:
    """Return errors [n] for images, of which these [n] bool are not scanned."""
    return np.where(rows, "not scanned", "").astype(object)


def _cache_file(store: ImageStore, cache: Path, max_pixels: int) -> Path | None:
    """Return the cache file of a store in its present state; None if the store cannot detect changes."""
    key = hashlib.sha256(repr([VERSION, max_pixels]).encode())
    for i in range(len(store)):
        stamp = store.stamp(i)
        if not stamp:
            return None
        key.update(repr(stamp).encode())
    return cache / "scans" / f"{key.hexdigest()[:32]}.npz"


def _load_cached(file: Path | None, n: int) -> Scan:
    if file is None or not file.exists():
        return _empty(n)
    try:
        with ZipFile(file) as archive:
            if archive.testzip() is not None:
                return _empty(n)
        with open(file, "rb") as stream, np.load(stream) as arrays:
            return Scan(arrays["hashes"], arrays["sizes"], arrays["grey"], _unscanned(arrays["bad"]))
    except Exception:  # truncated by a crash of the machine, or damaged, which may raise anything: scanned again
        return _empty(n)


def _save(found: Scan, file: Path) -> None:
    partial = file.with_suffix(f".{os.getpid()}")
    with disk_errors(file.parents[1]):
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as stream:
            np.savez(stream, hashes=found.hashes, sizes=found.sizes, grey=found.grey, bad=found.errors != "")
        partial.replace(file)
