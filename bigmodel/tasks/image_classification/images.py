"""Random access to the images of a prepared split: from a memory map, or from their source.

A prepared folder, all numbers little-endian::

    meta.json            its contents, see `PreparedImages`
    train-rows.npy       [N] int64, number of each image in the source
    train-labels.npy     [N] int64, class numbers; -1: unknown
    train-shapes.npy     [N, 2] int32, height and width: of the stored image; where none is stored, of the upright original
    train-pixels.bin     if they were decoded: the pixels of one image after the other, uint8 [H, W, C]; no header
    val-...

B images at once, N in the split, C channels, H and W pixels, S pixels to the edge of what a net reads.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from bigmodel.data.cache import write_text
from bigmodel.data.image_decoding import Box, Geometry, ImageError

if TYPE_CHECKING:
    from bigmodel.tasks.image_classification.batch import ImageStore

VERSION = 1  # of this format

# Pages of a memory map that were read stay in the process's resident memory, with up to ten times as many neighbouring
# pages: releasing all after this number of bytes limits it to some 200 MB.
RELEASE_BYTES = 2**24

Stored = Literal["square", "whole", "no"]


@dataclass
class SplitInfo:
    """One split: its images, the number of each class, and how they are stored: decoded as S x S pixels (square),
    decoded with the shorter edge of `resize` (whole), or not decoded (no).
    """

    num_images: int
    class_counts: list[int]
    stored: Stored


@dataclass
class PreparedImages:
    """Contents of a prepared folder.

    Attributes:
        folder: its path.
        classes: their names, by class number.
        channels: 1 (grey) or 3 (RGB).
        size: S.
        resize: length of the shorter edge after resizing, before the S x S centre crop.
        max_pixels: of an image.
        splits: by name.
        mean: of each channel over the training images as in evaluation, 0 to 1.
        std: likewise; at least 1/255.
        fingerprint: hash of classes, geometry, and of the splits' contents and labels in their order.
        decoded: True if pixels are stored; else images are decoded each time they are read.
        skipped: names of the images that cannot be used.
        stores: of the images, by split.
        hashes: of the contents, [N] int64 by split.
        version: of this format.
    """

    folder: Path
    classes: list[str]
    channels: int
    size: int
    resize: int
    max_pixels: int
    splits: dict[str, SplitInfo]
    mean: list[float]
    std: list[float]
    fingerprint: str
    decoded: bool
    skipped: list[str] = field(default_factory=list)
    stores: dict[str, ImageStore] = field(default_factory=dict, repr=False, compare=False)
    hashes: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    version: int = VERSION

    def save(self, folder: Path) -> None:
        """Write meta.json: all attributes but the folder, and those of the source: stores, hashes, skipped images."""
        meta = {key: value for key, value in vars(self).items() if key not in ("folder", "stores", "hashes", "skipped")}
        meta["splits"] = {  # the earlier name `num_pictures` stays, so that existing folders can be read
            name: {"num_pictures": split.num_images, "class_counts": split.class_counts, "stored": split.stored}
            for name, split in self.splits.items()
        }
        write_text(folder / "meta.json", json.dumps(meta, indent=2))

    @classmethod
    def load(cls, folder: Path) -> PreparedImages:
        """Read meta.json."""
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        meta["splits"] = {
            name: SplitInfo(split["num_pictures"], split["class_counts"], split["stored"])
            for name, split in meta["splits"].items()
        }
        return cls(folder=folder, **meta)

    @property
    def geometry(self) -> Geometry:
        """Geometry of the decoded images."""
        return Geometry(self.channels, self.size, self.resize, self.max_pixels)

    def images(self, split: str) -> Images:
        """Return the images of a split."""
        return Images(self.folder, split, self.stores[split])


class Images:
    """Images of one split, with random access; cheap to pickle if the store is.

    Args:
        folder: a prepared folder.
        split: name of the split.
        store: of the source: for names, and for images that were not decoded.

    Attributes:
        labels: [N] int64 class numbers; -1: unknown.
        shapes: [N, 2] int32, height and width of each image, in the pixels that boxes are given in.
        in_memory: True if reading only accesses mapped memory, so that worker processes are useless.
        takes_boxes: True if `read` can crop each image.
        shape: (S, S, C), of an image returned by `read`.

    Raises:
        ValueError: if the folder is damaged.
    """

    def __init__(self, folder: Path, split: str, store: ImageStore) -> None:
        meta = PreparedImages.load(folder)
        self.folder, self.split, self.store = folder, split, store
        self.labels: np.ndarray = np.load(folder / f"{split}-labels.npy")
        self.shapes: np.ndarray = np.load(folder / f"{split}-shapes.npy")
        self._rows = np.load(folder / f"{split}-rows.npy")
        self._geometry = meta.geometry
        self.shape = (meta.size, meta.size, meta.channels)
        stored = meta.splits[split].stored
        self.in_memory, self.takes_boxes = stored == "square", stored != "square"
        self._map = None if stored == "no" else _map_pixels(folder, split, self._sizes.sum())
        if self._map is not None:
            self._pixels = np.frombuffer(self._map, np.uint8)
            self._starts = np.concatenate([[0], self._sizes.cumsum()])
        self._bytes_read = 0

    def __reduce__(self) -> tuple[type[Images], tuple[Path, str, ImageStore]]:
        return Images, (self.folder, self.split, self.store)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def name(self, i: int) -> str:
        """Return the name of image i."""
        return self.store.name(int(self._rows[i]))

    def read(
        self, numbers: Sequence[int] | np.ndarray, boxes: np.ndarray | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Return images [B, S, S, C] uint8.

        Args:
            numbers: [B], numbers of the images in the split.
            boxes: [B, 4] left, top, right, bottom: the part of each that becomes S x S pixels; only if `takes_boxes`.
                None: the geometry of evaluation.
            out: [B, S, S, C] uint8, the output array; None: a new array.

        Raises:
            ValueError: if an image cannot be read any more; names it.
        """
        numbers = np.asarray(numbers)
        if boxes is not None and not self.takes_boxes:
            raise ValueError(
                f"images of the {self.split} split are stored as squares: boxes cannot be cropped from them"
            )
        images = np.empty((len(numbers), *self.shape), np.uint8) if out is None else out
        if self.in_memory:
            np.take(self._pixels.reshape(-1, *self.shape), numbers, axis=0, out=images)
        else:
            parts = [None] * len(numbers) if boxes is None else [(x, y, z, w) for x, y, z, w in boxes.tolist()]
            for image, i, box in zip(images, numbers.tolist(), parts, strict=True):
                image[:] = self._read(i, box)
        self._release(images.nbytes)
        return images

    def _read(self, i: int, box: Box | None) -> np.ndarray:
        if self._map is None:
            return decode_from(self.store, int(self._rows[i]), self._geometry, box)
        height, width = self.shapes[i]
        pixels = self._pixels[self._starts[i] : self._starts[i + 1]]
        return self._geometry.decode(pixels.reshape(height, width, self._geometry.channels), box)

    @property
    def _sizes(self) -> np.ndarray:
        """[N] int64, stored bytes of each image."""
        return self.shapes.astype(np.int64).prod(1) * self._geometry.channels

    def _release(self, num_bytes: int) -> None:
        self._bytes_read += num_bytes
        if self._map is not None and self._bytes_read > RELEASE_BYTES:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._bytes_read = 0


def decode_from(
    store: ImageStore, row: int, geometry: Geometry, box: Box | None = None, whole: bool = False
) -> np.ndarray:
    """Return an image of a source in the given geometry, see `Geometry`.

    Raises:
        ValueError: if it cannot be read any more, though it was valid when it was checked; names it.
    """
    try:
        content = store.read(row)
        return geometry.decode_whole(content) if whole else geometry.decode(content, box)
    except ImageError as error:
        raise ValueError(f"{store.name(row)}: {error}. It was valid when it was checked: start again") from error
    except OSError as error:
        raise ValueError(f"{store.name(row)} cannot be read any more ({error.strerror or error})") from error


def _map_pixels(folder: Path, split: str, expected: int) -> mmap.mmap:
    path = folder / f"{split}-pixels.bin"
    size = path.stat().st_size if path.exists() else 0
    if size != expected:
        raise ValueError(f"{path} is damaged: {size:,} bytes, not {expected:,}. Delete {folder} and start again")
    with open(path, "rb") as stream:
        return mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ)
