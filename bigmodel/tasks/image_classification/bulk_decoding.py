"""Decode many images in worker processes, to write them to a file and to compute mean and standard deviation.

N images, C channels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bigmodel.data.image_decoding import Geometry
from bigmodel.data.worker_pool import WorkerPool
from bigmodel.tasks.image_classification.images import decode_from
from bigmodel.tasks.image_classification.scan import BLOCK, load_store

BLOCK_BYTES = 2**24  # pixels that a worker process decodes at once, about, if these are fewer images than `BLOCK`

_WIDTH = 1024


class PixelStatistics(NamedTuple):
    """Number of pixels, sum [C] and sum of squares [C] of their values, 0 to 255; exact in any order."""

    num_pixels: int
    total: tuple[int, ...]
    squares: tuple[int, ...]

    def mean(self) -> list[float]:
        """Mean [C], 0 to 1."""
        return [total / self.num_pixels / 255 for total in self.total]

    def std(self) -> list[float]:
        """Standard deviation [C], of pixels from 0 to 1; at least 1/255."""
        moments = zip(self.total, self.squares, strict=True)
        variances = [(squares * self.num_pixels - total**2) / self.num_pixels**2 for total, squares in moments]
        return [max(1.0, variance**0.5) / 255 for variance in variances]


@dataclass(frozen=True)
class BulkDecoding:
    """Settings of decoding, and the output file.

    Attributes:
        store_file: their store, see `load_store`.
        geometry: of the decoded images.
        whole: decode all of each image, not only the centre crop.
        path: the file that their pixels are written to, concatenated; None: no file.
    """

    store_file: str
    geometry: Geometry
    whole: bool
    path: Path | None

    def run(
        self, workers: WorkerPool, rows: np.ndarray, shapes: np.ndarray, advance: Callable[[int], None]
    ) -> PixelStatistics:
        """Decode images.

        Args:
            workers: the worker processes.
            rows: [N], numbers of the images in the store.
            shapes: [N, 2], height and width after decoding.
            advance: called with the number of newly decoded images.

        Raises:
            ValueError: if one cannot be decoded as expected, though it was valid when it was checked; names it.
        """
        ends = np.cumsum(shapes.astype(np.int64).prod(1)) * self.geometry.channels  # [bytes]
        num_images = int(min(BLOCK, max(1, BLOCK_BYTES * len(rows) // ends[-1])))
        starts = range(0, len(rows), num_images)
        blocks = ((int(ends[i - 1]) if i else 0, rows[i : i + num_images], shapes[i : i + num_images]) for i in starts)
        if self.path is not None:
            self.path.touch()
        sums = []
        for i, block in zip(starts, workers.map(partial(_decode_block, self), blocks), strict=True):
            sums.append(block)
            advance(min(num_images, len(rows) - i))
        if self.path is not None:
            with open(self.path, "rb") as stream:
                os.fsync(stream.fileno())
        num_pixels, totals, squares = zip(*sums, strict=True)
        return PixelStatistics(
            sum(num_pixels), tuple(map(sum, zip(*totals, strict=True))), tuple(map(sum, zip(*squares, strict=True)))
        )


def _decode_block(job: BulkDecoding, block: tuple[int, np.ndarray, np.ndarray]) -> PixelStatistics:
    """Decode some images and write them at their offset in the file; run in a worker process.

    Args:
        job: see `BulkDecoding`.
        block: their offset in the file [bytes], rows and shapes.
    """
    start, rows, shapes = block
    store = load_store(job.store_file)
    decoded = []
    for row, shape in zip(rows.tolist(), shapes.tolist(), strict=True):
        image = decode_from(store, row, job.geometry, whole=job.whole)
        if list(image.shape[:2]) != shape:
            raise ValueError(f"{store.name(row)} has a different size than when it was checked: start again")
        decoded.append(image.reshape(-1, job.geometry.channels))
    pixels = np.concatenate(decoded)  # [pixels, C]
    if job.path is not None:
        with open(job.path, "r+b") as stream:
            stream.seek(start)
            stream.write(pixels.data)
    squares = np.square(pixels, dtype=np.uint16)  # 255^2 just fits
    return PixelStatistics(len(pixels), _sums(pixels), _sums(squares))


def _sums(values: np.ndarray) -> tuple[int, ...]:
    """Sum over the first dimension of values [P, C]; ten times as fast as numpy's sum, which adds C numbers at a time."""
    wide = len(values) - len(values) % _WIDTH
    sums = values[:wide].reshape(-1, _WIDTH * values.shape[1]).sum(0, dtype=np.int64)  # [P, C] -> [P / width, width C]
    total = sums.reshape(_WIDTH, -1).sum(0) + values[wide:].sum(0, dtype=np.int64)  # [width C] -> [width, C] -> [C]
    return tuple(total.tolist())
