"""Prepare images once: check and split them, and, if they fit, decode them into memory-mapped files.

The key of a prepared folder is a hash of the images' contents in their order, of their labels and splits, and of the
geometry; not of paths, so a folder of images may be moved. Layout::

    <cache>/<key>/          see images.py
    <cache>/scans/          see scan.py

This module imports neither torch nor Lightning.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from bigmodel.data.cache import available_cores, building, digest, disk_errors, first_of, progress, say, write_array
from bigmodel.data.checksums import compare_checksums, write_checksums
from bigmodel.data.image_decoding import Geometry
from bigmodel.data.worker_pool import WorkerPool
from bigmodel.tasks.image_classification.bulk_decoding import BulkDecoding
from bigmodel.tasks.image_classification.images import VERSION, PreparedImages, SplitInfo, Stored
from bigmodel.tasks.image_classification.scan import BLOCK, Scan, scan, store_files
from bigmodel.tasks.image_classification.splits import ImageSplit, draw_shots

if TYPE_CHECKING:
    from bigmodel.tasks.image_classification.batch import ImageSource, ImageStore

DECODED_BYTES = 4 * 10**9  # maximum size of decoded images by default
NUM_MEASURED = 5000  # maximum number of images for mean and standard deviation, if squares of all are not available
_SHOWN = 10  # corrupt images named in an error


@dataclass(frozen=True)
class _Part:
    """A split: rows [N] of a store, their labels [N], and the results of the scan."""

    store: ImageStore
    rows: np.ndarray
    labels: np.ndarray
    scanned: Scan
    stored: Stored = "no"

    def take(self, which: np.ndarray) -> _Part:
        """Return only these images [M] of the split."""
        scanned = Scan(*(column[which] for column in self.scanned))
        return replace(self, rows=self.rows[which], labels=self.labels[which], scanned=scanned)

    def shapes(self, geometry: Geometry) -> np.ndarray:
        """Return [N, 2] height and width of the images as they are stored; of the originals if they are not."""
        if self.stored == "square":
            return np.full((len(self.rows), 2), geometry.size, np.int32)
        return geometry.whole_sizes(self.scanned.sizes) if self.stored == "whole" else self.scanned.sizes

    def num_bytes(self, geometry: Geometry) -> int:
        """Return the bytes of all stored pixels."""
        return (
            0 if self.stored == "no" else int(self.shapes(geometry).astype(np.int64).prod(1).sum()) * geometry.channels
        )

    def content(self) -> str:
        """Return a hash of the contents and labels in their order."""
        return hashlib.sha256(self.scanned.hashes.tobytes() + self.labels.astype("<i8").tobytes()).hexdigest()


def prepare(
    source: ImageSource,
    *,
    size: int,
    resize: int | None,
    channels: int | None,
    whole: bool,
    split: ImageSplit | None,
    on_corrupt: Literal["error", "skip"],
    cache_decoded: bool | None,
    cache: Path,
    max_pixels: int,
    classes: Sequence[str] | None = None,
    shots: int | None = None,
    seed: int = 0,
    num_processes: int | None = None,
) -> PreparedImages:
    """Check and split the images, and make their prepared folder, unless it exists. Any number of processes may
    do so at the same time.

    Args:
        source: the images found at a path. Arguments that are not described here are those of `ImageData`.
        whole: store training images uncropped, so that they can be cropped at random.
        split: None: the splits of the source are used.
        cache: folder of the task.
        num_processes: worker processes; None: one per core.

    Raises:
        ValueError: if images are corrupt and not to be skipped, a split or a class stays empty, or an argument is wrong.
        OSError: if the disk is full; the message names the required space and the place.
    """
    resize = size if resize is None else resize
    _check_arguments(size, resize, channels, on_corrupt)
    num_processes = num_processes or available_cores()
    parts, skipped = _scan_parts(source, cache, max_pixels, num_processes, on_corrupt)
    if classes is not None:
        source, parts = _select_classes(source, parts, classes)
    if split is not None:
        parts = _assign_splits(parts, split)
    if shots is not None:
        train = parts["train"]
        parts["train"] = train.take(draw_shots(train.labels, train.scanned.hashes, source.classes, shots, seed))
    _check_parts(parts, source, skipped, split)

    if channels is None:
        channels = 1 if parts[_reference(parts)].scanned.grey.all() else 3
    geometry = Geometry(channels, size, resize, max_pixels)
    parts, num_bytes = _choose_storage(parts, geometry, whole, cache_decoded)
    made = _describe(parts, source.classes, geometry, cache, whole)
    if not (made.folder / "meta.json").exists():
        if skipped:
            say(f"skipped {len(skipped):,} corrupt images: {first_of(skipped, 3)}")
        _report_duplicates(parts)
        if cache_decoded is None:
            _report_storage(made.decoded, num_bytes)
        _write(made, parts, num_processes)
    compare_checksums(made.folder)
    prepared = PreparedImages.load(made.folder)
    prepared.skipped, prepared.stores = skipped, {name: part.store for name, part in parts.items()}
    prepared.hashes = {name: part.scanned.hashes.view("<i8")[:, 0] for name, part in parts.items()}
    return prepared


def _check_arguments(size: int, resize: int, channels: int | None, on_corrupt: str) -> None:
    if size < 1:
        raise ValueError(f"--data.size {size}: at least 1 pixel is accepted")
    if resize < size:
        raise ValueError(
            f"--data.resize {resize} is smaller than --data.size {size}, the size of the crop: set it to at least {size},"
            " or leave it out"
        )
    if channels not in (None, 1, 3):
        raise ValueError(f"--data.channels {channels}: 1 (grey) and 3 (RGB) are accepted; by default the images decide")
    if on_corrupt not in ("error", "skip"):
        raise ValueError(f"--data.on_corrupt {on_corrupt}: error and skip are accepted")


def _scan_parts(
    source: ImageSource, cache: Path, max_pixels: int, num_processes: int, on_corrupt: str
) -> tuple[dict[str, _Part], list[str]]:
    """Return the usable images of each split, and the names of the others; raise if these are not to be skipped."""
    scans = scan({name: found.store for name, found in source.splits.items()}, cache, max_pixels, num_processes)
    parts = {
        name: _Part(found.store, np.arange(len(found.labels)), np.asarray(found.labels, np.int64), scans[name])
        for name, found in source.splits.items()
    }
    corrupt = [(part, row) for part in parts.values() for row in np.flatnonzero(part.scanned.errors != "").tolist()]
    if corrupt and on_corrupt == "error":
        lines = [f"  {part.store.name(row)}: {part.scanned.errors[row]}" for part, row in corrupt[:_SHOWN]]
        more = [f"  and {len(corrupt) - _SHOWN:,} more"] if len(corrupt) > _SHOWN else []
        total = sum(len(part.rows) for part in parts.values())
        raise ValueError(
            "\n".join([f"{len(corrupt):,} of {total:,} images cannot be used:", *lines, *more])
            + "\nRepair or remove them, or set --data.on_corrupt skip"
        )
    usable = {name: part.take(np.flatnonzero(part.scanned.errors == "")) for name, part in parts.items()}
    return usable, [part.store.name(row) for part, row in corrupt]


def _select_classes(
    source: ImageSource, parts: dict[str, _Part], classes: Sequence[str]
) -> tuple[ImageSource, dict[str, _Part]]:
    """Select only images of these classes, which are renumbered in the same order."""
    if missing := [name for name in classes if name not in source.classes]:
        raise ValueError(
            f"--data.classes {first_of(missing, 3)}: not among the classes of the data, which are"
            f" {first_of(source.classes, _SHOWN)}"
        )
    selected = [name for name in source.classes if name in classes]
    numbers = np.array([selected.index(name) if name in selected else -1 for name in source.classes])
    chosen = {}
    for name, part in parts.items():
        labels = np.where(part.labels < 0, -1, numbers[part.labels])
        chosen[name] = replace(part, labels=labels).take(np.flatnonzero(labels >= 0))
    return replace(source, classes=selected), chosen


def _assign_splits(parts: dict[str, _Part], split: ImageSplit) -> dict[str, _Part]:
    """Return the splits for training and evaluation: those of the source, and missing ones drawn from train."""
    if "all" in parts:
        whole = parts["all"]
    elif "train" in parts and "val" not in parts and split.val > 0:
        whole, split = parts["train"], ImageSplit(split.val)
    else:
        return parts
    assigned = {name: whole.take(rows) for name, rows in split.assign(whole.labels, whole.scanned.hashes).items()}
    return assigned | {name: part for name, part in parts.items() if name not in ("all", "train")}


def _check_parts(parts: dict[str, _Part], source: ImageSource, skipped: list[str], split: ImageSplit | None) -> None:
    """Check that the splits can be used for training and evaluation."""
    reasons = [f"{len(skipped):,} corrupt images were skipped"] if skipped else []
    drawn = set(parts) != set(source.splits)
    if drawn:
        reasons.append(f"the splits were drawn by {split}")
    reason = f" ({'; '.join(reasons)})" if reasons else ""
    for name, part in parts.items():
        if len(part.rows) == 0:
            share = f", or set a larger --data.split.{name}" if drawn and name != "train" else ""
            raise ValueError(f"the {name} split has no images{reason}. Add images{share}")
    if "train" not in parts:
        return
    for name in ("train", "val"):
        if name in parts and (unknown := np.flatnonzero(parts[name].labels < 0)).size:
            part = parts[name]
            names = [part.store.name(row) for row in part.rows[unknown[:3]].tolist()]
            raise ValueError(f"{len(unknown):,} images of the {name} split have no label: {first_of(names, 3)}")
    classes = source.classes
    if len(classes) < 2:
        raise ValueError(f"the data have {len(classes)} class(es), {classes}{reason}: at least 2 are needed to train")
    counts = np.bincount(parts["train"].labels, minlength=len(classes))
    if (counts == 0).any():
        empty = [classes[i] for i in np.flatnonzero(counts == 0)]
        raise ValueError(
            f"{len(empty):,} of {len(classes):,} classes have no training images{reason}: {first_of(empty, _SHOWN)}."
            " Add images of them, set smaller --data.split.val and --data.split.test, or remove the classes"
        )


def _choose_storage(
    parts: dict[str, _Part], geometry: Geometry, whole: bool, cache_decoded: bool | None
) -> tuple[dict[str, _Part], int]:
    """Return the splits with the way their images are stored, and the bytes of all images if stored decoded."""
    stored = {
        name: replace(part, stored="whole" if whole and name == "train" else "square") for name, part in parts.items()
    }
    num_bytes = sum(part.num_bytes(geometry) for part in stored.values())
    decoded = num_bytes <= DECODED_BYTES if cache_decoded is None else cache_decoded
    return stored if decoded else parts, num_bytes


def _describe(
    parts: dict[str, _Part], classes: list[str], geometry: Geometry, cache: Path, whole: bool
) -> PreparedImages:
    """Return the contents of the prepared folder, without mean and standard deviation; its name is their hash."""
    decoded = any(part.stored != "no" for part in parts.values())
    size, resize, channels, max_pixels = geometry.size, geometry.resize, geometry.channels, geometry.max_pixels
    # Random crops of images that are stored whole, with the shorter edge resized, may have other pixels.
    key = [VERSION, classes, channels, size, resize, whole, whole and decoded]
    fingerprint = digest([*key, {name: part.content() for name, part in parts.items()}])
    rows = {name: hashlib.sha256(part.rows.astype("<i8").tobytes()).hexdigest() for name, part in parts.items()}
    counts = {name: np.bincount(part.labels[part.labels >= 0], minlength=len(classes)) for name, part in parts.items()}
    return PreparedImages(
        folder=cache / digest([fingerprint, max_pixels, decoded, rows]),
        classes=list(classes),
        channels=channels,
        size=size,
        resize=resize,
        max_pixels=max_pixels,
        splits={name: SplitInfo(len(part.rows), counts[name].tolist(), part.stored) for name, part in parts.items()},
        mean=[],
        std=[],
        fingerprint=fingerprint,
        decoded=decoded,
    )


def _report_duplicates(parts: dict[str, _Part]) -> None:
    """Report images of the evaluation splits that are in the training split too."""
    for name, part in parts.items():
        if name != "train" and "train" in parts:
            seen = np.isin(part.scanned.hashes.view("V16"), parts["train"].scanned.hashes.view("V16"))
            if count := int(seen.sum()):
                say(f"{count:,} of {len(part.rows):,} images of the {name} split are in the train split too")


def _report_storage(decoded: bool, num_bytes: int) -> None:
    size = f"{num_bytes / 1e6:,.1f} MB"
    if decoded:
        say(f"decoded images are cached, {size} on the disk (--data.cache_decoded false: decode them at each read)")
    else:
        say(f"images are decoded at each read (--data.cache_decoded true: cache them decoded, {size} on the disk)")


def _reference(parts: dict[str, _Part]) -> str:
    """Return the split that determines the statistics and the number of channels."""
    return "train" if "train" in parts else next(iter(parts))


def _write(prepared: PreparedImages, parts: dict[str, _Part], num_processes: int) -> None:
    """Write the prepared folder.

    Mean and standard deviation are those of the training images in the geometry of evaluation: of all if those are
    stored that way, else of at most 5,000, spread evenly. Where nothing is trained, they are those of the first split.
    """
    began = time.monotonic()
    geometry, reference = prepared.geometry, _reference(parts)
    num_bytes = sum(part.num_bytes(geometry) for part in parts.values())
    num_blocks = -(-max(len(part.rows) for part in parts.values()) // BLOCK)
    with ExitStack() as stack:
        stack.enter_context(disk_errors(prepared.folder.parent, lambda: num_bytes))
        folder = stack.enter_context(building(prepared.folder))
        files = stack.enter_context(store_files({name: part.store for name, part in parts.items()}))
        workers = stack.enter_context(WorkerPool(min(num_processes, num_blocks)))
        statistics = {}
        for name, part in parts.items():
            shapes = part.shapes(geometry)
            write_array(folder / f"{name}-rows.npy", part.rows.astype("<i8"))
            write_array(folder / f"{name}-labels.npy", part.labels.astype("<i8"))
            write_array(folder / f"{name}-shapes.npy", shapes.astype("<i4"))
            if part.stored != "no":
                decoding = BulkDecoding(files[name], geometry, part.stored == "whole", folder / f"{name}-pixels.bin")
                with progress(f"decoding {name}", len(shapes), "images") as advance:
                    statistics[name] = decoding.run(workers, part.rows, shapes, advance)
        if parts[reference].stored != "square":
            rows = parts[reference].rows
            rows = rows[np.linspace(0, len(rows) - 1, min(NUM_MEASURED, len(rows))).round().astype(np.int64)]
            shapes = np.full((len(rows), 2), geometry.size)
            decoding = BulkDecoding(files[reference], geometry, False, None)
            with progress("computing mean and standard deviation", len(rows), "images") as advance:
                statistics[reference] = decoding.run(workers, rows, shapes, advance)
        prepared.mean, prepared.std = statistics[reference].mean(), statistics[reference].std()
        prepared.save(folder)
        write_checksums(folder)
    counts = ", ".join(f"{name} {split.num_images:,}" for name, split in prepared.splits.items())
    say(f"prepared images in {time.monotonic() - began:,.1f} s in {prepared.folder}")
    classes = f"{len(prepared.classes):,} classes, " if prepared.classes else ""
    say(f"{counts}; {classes}{prepared.channels} channel{'s' * (prepared.channels > 1)}")
