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
from bigmodel.data.image_decoding import Geometry
from bigmodel.data.worker_pool import WorkerPool
from bigmodel.tasks.image_classification.images import VERSION, Prepared, SplitFacts, Stored
from bigmodel.tasks.image_classification.pixels import Decoding
from bigmodel.tasks.image_classification.scan import BLOCK, Scan, scan, store_files
from bigmodel.tasks.image_classification.splits import Split, draw_shots

if TYPE_CHECKING:
    from bigmodel.tasks.image_classification.batch import Source, Store

DECODED_BYTES = 4 * 10**9  # maximum size of decoded images by default
MEASURED = 5000  # maximum number of images for mean and standard deviation, if squares of all are not available
_SHOWN = 10  # bad images named in an error


@dataclass(frozen=True)
class _Part:
    """A split: rows [N] of a store, their labels [N], and the results of the scan."""

    store: Store
    rows: np.ndarray
    labels: np.ndarray
    found: Scan
    stored: Stored = "no"

    def take(self, which: np.ndarray) -> _Part:
        """Return only these images [M] of the split."""
        found = Scan(*(column[which] for column in self.found))
        return replace(self, rows=self.rows[which], labels=self.labels[which], found=found)

    def shapes(self, geometry: Geometry) -> np.ndarray:
        """Return [N, 2] height and width of the images as they are stored; of the originals if they are not."""
        if self.stored == "square":
            return np.full((len(self.rows), 2), geometry.size, np.int32)
        return geometry.whole_sizes(self.found.sizes) if self.stored == "whole" else self.found.sizes

    def num_bytes(self, geometry: Geometry) -> int:
        """Return the bytes of all stored pixels."""
        return (
            0 if self.stored == "no" else int(self.shapes(geometry).astype(np.int64).prod(1).sum()) * geometry.channels
        )

    def content(self) -> str:
        """Return a hash of the contents and labels in their order."""
        return hashlib.sha256(self.found.hashes.tobytes() + self.labels.astype("<i8").tobytes()).hexdigest()


def prepare(
    source: Source,
    *,
    size: int,
    resize: int | None,
    channels: int | None,
    whole: bool,
    split: Split | None,
    on_bad: Literal["error", "skip"],
    decoded: bool | None,
    cache: Path,
    max_pixels: int,
    classes: Sequence[str] | None = None,
    shots: int | None = None,
    seed: int = 0,
    num_processes: int | None = None,
) -> Prepared:
    """Check and split the images, and make their prepared folder, unless it exists. Any number of processes may
    do so at the same time.

    Mean and standard deviation are those of the training images in the geometry of evaluation: of all if those are
    stored that way, else of at most 5,000, spread evenly. Where nothing is trained, they are those of the first split.

    Args:
        source: the images found at a path.
        size: S, edge of the square that the net reads [pixels].
        resize: length of the shorter edge after resizing, before the centre crop [pixels]; None: `size`.
        channels: 1 or 3; None: 1 if all training images are grey, else 3.
        whole: store training images uncropped, so that they can be cropped at random.
        split: shares of the splits; None: the splits of the source are used.
        on_bad: action for images that cannot be used: raise an error, or skip them.
        decoded: store pixels; None: if all of them take at most 4 GB.
        cache: folder of the task.
        max_pixels: an image with more is invalid.
        classes: names of the classes to use; None: all.
        shots: number of training images per class, drawn by `seed`; None: all.
        seed: see `shots`.
        num_processes: worker processes; None: one per core.

    Raises:
        ValueError: if images are bad and not to be skipped, a split or a class stays empty, or an argument is wrong.
        OSError: if the disk is full; the message names the required space and the place.
    """
    resize = size if resize is None else resize
    _check_settings(size, resize, channels)
    num_processes = num_processes or available_cores()
    scans = scan({name: found.store for name, found in source.splits.items()}, cache, max_pixels, num_processes)
    parts = {
        name: _Part(found.store, np.arange(len(found.labels)), np.asarray(found.labels, np.int64), scans[name])
        for name, found in source.splits.items()
    }
    left_out = _bad(parts, on_bad)
    parts = {name: part.take(np.flatnonzero(part.found.errors == "")) for name, part in parts.items()}
    if classes is not None:
        source, parts = _chosen(source, parts, classes)
    if split is not None:
        parts = _dealt(parts, split)
    if shots is not None:
        train = parts["train"]
        parts["train"] = train.take(draw_shots(train.labels, train.found.hashes, source.classes, shots, seed))
    _check_parts(parts, source, left_out, split)

    if channels is None:
        channels = 1 if parts[_reference(parts)].found.grey.all() else 3
    geometry = Geometry(channels, size, resize, max_pixels)
    stored = {
        name: replace(part, stored="whole" if whole and name == "train" else "square") for name, part in parts.items()
    }
    needed = sum(part.num_bytes(geometry) for part in stored.values())
    chosen = needed <= DECODED_BYTES if decoded is None else decoded
    if chosen:
        parts = stored

    facts = [VERSION, source.classes, channels, size, resize, whole, whole and chosen]  # crops of whole ones may differ
    fingerprint = digest([*facts, {name: part.content() for name, part in parts.items()}])
    rows = {name: hashlib.sha256(part.rows.astype("<i8").tobytes()).hexdigest() for name, part in parts.items()}
    folder = cache / digest([fingerprint, max_pixels, chosen, rows])
    if not (folder / "meta.json").exists():
        if left_out:
            say(f"left out {len(left_out):,} images that cannot be used: {first_of(left_out, 3)}")
        _say_copies(parts)
        if decoded is None:
            say(_choice(chosen, needed))
        made = Prepared(
            folder=folder,
            classes=list(source.classes),
            channels=channels,
            size=size,
            resize=resize,
            max_pixels=max_pixels,
            splits={name: _facts(part, len(source.classes)) for name, part in parts.items()},
            mean=[],
            std=[],
            fingerprint=fingerprint,
            decoded=chosen,
        )
        _make(made, parts, num_processes)
    prepared = Prepared.load(folder)
    prepared.left_out, prepared.stores = left_out, {name: part.store for name, part in parts.items()}
    return prepared


def _check_settings(size: int, resize: int, channels: int | None) -> None:
    if size < 1:
        raise ValueError(f"--data.size {size}: images have an edge of at least 1 pixel")
    if resize < size:
        raise ValueError(
            f"--data.resize {resize} is smaller than --data.size {size}: {size} x {size} pixels cannot be cut out of it;"
            f" leave it out, or give at least {size}"
        )
    if channels not in (None, 1, 3):
        raise ValueError(
            f"--data.channels {channels}: 1 (grey) or 3 (RGB) is accepted, or none to let the images decide"
        )


def _bad(parts: dict[str, _Part], on_bad: str) -> list[str]:
    """Return the names of the images that cannot be used; raise an error if they are not to be skipped."""
    if on_bad not in ("error", "skip"):
        raise ValueError(f"--data.on_bad {on_bad}: error or skip is accepted")
    bad = [(part, row) for part in parts.values() for row in np.flatnonzero(part.found.errors != "").tolist()]
    if bad and on_bad == "error":
        lines = [f"  {part.store.name(row)}: {part.found.errors[row]}" for part, row in bad[:_SHOWN]]
        more = [f"  and {len(bad) - _SHOWN:,} more"] if len(bad) > _SHOWN else []
        total = sum(len(part.rows) for part in parts.values())
        raise ValueError(
            "\n".join([f"{len(bad):,} of {total:,} images cannot be used:", *lines, *more])
            + "\nMend or remove them, or leave them out with --data.on_bad skip"
        )
    return [part.store.name(row) for part, row in bad]


def _chosen(source: Source, parts: dict[str, _Part], classes: Sequence[str]) -> tuple[Source, dict[str, _Part]]:
    """Select only images of these classes, which are renumbered in the same order."""
    if missing := [name for name in classes if name not in source.classes]:
        raise ValueError(
            f"--data.classes {first_of(missing, 3)}: there is no such class but {first_of(source.classes, _SHOWN)}"
        )
    kept = [name for name in source.classes if name in classes]
    numbers = np.array([kept.index(name) if name in kept else -1 for name in source.classes])
    chosen = {}
    for name, part in parts.items():
        labels = np.where(part.labels < 0, -1, numbers[part.labels])
        chosen[name] = replace(part, labels=labels).take(np.flatnonzero(labels >= 0))
    return replace(source, classes=kept), chosen


def _dealt(parts: dict[str, _Part], split: Split) -> dict[str, _Part]:
    """Return the splits for training and evaluation: those of the source, and missing ones drawn from train."""
    if "all" in parts:
        whole, dealing = parts["all"], split
    elif "train" in parts and "val" not in parts and split.val > 0:
        whole, dealing = parts["train"], Split(split.val)
    else:
        return parts
    dealt = {name: whole.take(which) for name, which in dealing.deal(whole.labels, whole.found.hashes).items()}
    return dealt | {name: part for name, part in parts.items() if name not in ("all", "train")}


def _check_parts(parts: dict[str, _Part], source: Source, left_out: list[str], split: Split | None) -> None:
    """Check that the splits can be used for training and evaluation."""
    skipped = f" ({len(left_out):,} that cannot be used were left out)" if left_out else ""
    dealt = f", dealt out by {split}" if set(parts) != set(source.splits) else ""
    for name, part in parts.items():
        if len(part.rows) == 0:
            share = f", or a larger share (--data.split.{name})" if dealt and name != "train" else ""
            raise ValueError(f"the {name} split has no image{skipped}{dealt}. Give more images{share}")
    if "train" not in parts:
        return
    for name in ("train", "val"):
        if name in parts and (unknown := np.flatnonzero(parts[name].labels < 0)).size:
            part = parts[name]
            names = [part.store.name(row) for row in part.rows[unknown[:3]].tolist()]
            raise ValueError(f"{len(unknown):,} images of the {name} split have no label: {first_of(names, 3)}")
    classes = source.classes
    if len(classes) < 2:
        raise ValueError(f"at least 2 classes are needed to train, there are {len(classes)}: {classes}{skipped}")
    counts = np.bincount(parts["train"].labels, minlength=len(classes))
    if (counts == 0).any():
        empty = [classes[i] for i in np.flatnonzero(counts == 0)]
        raise ValueError(
            f"{len(empty):,} of {len(classes):,} classes have no training image{skipped}{dealt}:"
            f" {first_of(empty, _SHOWN)}. Give more images of them, smaller shares (--data.split.val, --data.split.test),"
            " or remove the classes"
        )


def _say_copies(parts: dict[str, _Part]) -> None:
    """Report images that are in several splits of a dataset: then evaluation is not on unseen images."""
    for name, part in parts.items():
        if name != "train" and "train" in parts:
            seen = np.isin(part.found.hashes.view("V16"), parts["train"].found.hashes.view("V16"))
            if count := int(seen.sum()):
                say(f"{count:,} of {len(part.rows):,} images of the {name} split are in the train split too")


def _reference(parts: dict[str, _Part]) -> str:
    """Return the split that determines the statistics and the number of channels."""
    return "train" if "train" in parts else next(iter(parts))


def _choice(decoded: bool, needed: int) -> str:
    size = f"{needed / 1e6:,.1f} MB"
    if decoded:
        return f"images are decoded once, which takes {size} of disk (--data.decoded false: whenever they are read)"
    return f"images are decoded whenever they are read (--data.decoded true: once, which takes {size} of disk)"


def _facts(part: _Part, num_classes: int) -> SplitFacts:
    counts = np.bincount(part.labels[part.labels >= 0], minlength=num_classes)
    return SplitFacts(len(part.rows), counts.tolist(), part.stored)


def _make(prepared: Prepared, parts: dict[str, _Part], num_processes: int) -> None:
    """Make the prepared folder."""
    began = time.monotonic()
    geometry, reference = prepared.geometry, _reference(parts)
    needed = sum(part.num_bytes(geometry) for part in parts.values())
    num_blocks = -(-max(len(part.rows) for part in parts.values()) // BLOCK)
    with ExitStack() as stack:
        stack.enter_context(disk_errors(prepared.folder.parent, lambda: needed))
        folder = stack.enter_context(building(prepared.folder))
        files = stack.enter_context(store_files({name: part.store for name, part in parts.items()}))
        workers = stack.enter_context(WorkerPool(min(num_processes, num_blocks)))
        colours = {}
        for name, part in parts.items():
            shapes = part.shapes(geometry)
            write_array(folder / f"{name}-rows.npy", part.rows.astype("<i8"))
            write_array(folder / f"{name}-labels.npy", part.labels.astype("<i8"))
            write_array(folder / f"{name}-shapes.npy", shapes.astype("<i4"))
            if part.stored != "no":
                decoding = Decoding(files[name], geometry, part.stored == "whole", folder / f"{name}-pixels.bin")
                with progress(f"decoding {name}", len(shapes), "images") as advance:
                    colours[name] = decoding.run(workers, part.rows, shapes, advance)
        if parts[reference].stored != "square":
            rows = parts[reference].rows
            rows = rows[np.linspace(0, len(rows) - 1, min(MEASURED, len(rows))).round().astype(np.int64)]
            shapes = np.full((len(rows), 2), geometry.size)
            with progress("measuring colours", len(rows), "images") as advance:
                colours[reference] = Decoding(files[reference], geometry, False, None).run(
                    workers, rows, shapes, advance
                )
        prepared.mean, prepared.std = colours[reference].mean(), colours[reference].std()
        prepared.save(folder)
    counts = ", ".join(f"{name} {split.num_images:,}" for name, split in prepared.splits.items())
    say(f"prepared images in {time.monotonic() - began:,.1f} s in {prepared.folder}")
    classes = f"{len(prepared.classes):,} classes, " if prepared.classes else ""
    say(f"{counts}; {classes}{prepared.channels} channel{'s' * (prepared.channels > 1)}")
