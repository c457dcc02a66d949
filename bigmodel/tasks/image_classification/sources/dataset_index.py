"""Result of a reader, and its conversion to an `ImageSource`: names of splits, class numbers, checks of all formats.

N images, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from bigmodel.data.cache import say
from bigmodel.data.split_shares import SPLIT_WORDS, split_name
from bigmodel.tasks.image_classification.batch import UNKNOWN, ImageSource, ImageStore, LabelledImages
from bigmodel.tasks.image_classification.sources.image_storage import ConcatStore

Labels = np.ndarray | Sequence[str]  # [N] integers, or names

KINDS = (
    "a folder of images (<class>/ or <train, val, test>/<class>/); a CSV or TSV table; Parquet (file, folder or glob); a"
    " data set saved by Hugging Face datasets, or hf://owner/name; an .npz of arrays; MNIST's idx files; CIFAR-10 or"
    " CIFAR-100 as published (python or binary version, or the .tar.gz); {mnist5k}, {digits}, {mnist}, {fashion_mnist},"
    " {cifar10}, {cifar100}"
)


@dataclass(frozen=True)
class RawSplit:
    """One split as it was read.

    Attributes:
        store: its images.
        labels: [N] class numbers or names; None if labels were not requested.
    """

    store: ImageStore
    labels: Labels | None


@dataclass(frozen=True)
class RawDataset:
    """The result of a reader.

    Attributes:
        where: the path, for messages.
        splits: by name: train, val, test; or all.
        classes: names by class number, if the format states them; else they are taken from the labels.
    """

    where: str
    splits: dict[str, RawSplit]
    classes: list[str] | None = None


def group_splits(words: Iterable[str], where: str, labelled: bool) -> dict[str, list[str]]:
    """Group names by the split that they stand for; all are `all` without labels, or if none stands for train."""
    words = list(words)
    splits = {word: split_name(word) for word in words}
    if not labelled or "train" not in splits.values():
        if labelled and any(splits.values()):
            say(f"{where}: no training split among {words}; new splits are drawn from all of them")
        return {"all": words}
    if skipped := [word for word in words if not splits[word]]:
        say(f"{where}: skipped {skipped}, which are not names of a split (accepted: {SPLIT_WORDS})")
    return {split: same for split in ("train", "val", "test") if (same := [w for w in words if splits[w] == split])}


def to_source(found: RawDataset, labelled: bool) -> ImageSource:
    """Number the classes and check every label.

    Raises:
        ValueError: if a split is empty, there are fewer than two classes, or a label is not one of the classes.
    """
    where = found.where
    for name, split in found.splits.items():
        if len(split.store) == 0:
            raise ValueError(f"--data.path {where}: no images in the split {name}")
    if not labelled:
        stores = [split.store for split in found.splits.values()]
        store = stores[0] if len(stores) == 1 else ConcatStore(stores)
        return ImageSource({"all": LabelledImages(store, np.full(len(store), UNKNOWN, np.int64))}, [])

    splits: dict[str, RawSplit] = {
        name: found.splits[name] for name in ("all", "train", "val", "test") if name in found.splits
    }
    first = next(iter(splits))
    if first not in ("all", "train"):
        if len(splits) > 1:
            raise ValueError(f"--data.path {where}: no training split, only {', '.join(splits)}")
        say(f"{where}: the only split is {first}; new splits are drawn from it")
        splits, first = {"all": splits[first]}, "all"
    lookup = _lookup(splits[first], found.classes)
    images: dict[str, LabelledImages] = {}
    for name, split in splits.items():
        values = _values(split)
        if name != first and found.classes and set(values) == {UNKNOWN}:
            say(f"{where}: skipped the split {name}, which has no labels (all are {UNKNOWN})")
            continue
        numbers = np.fromiter((lookup.get(value, UNKNOWN) for value in values), np.int64, len(values))
        if (numbers < 0).any():
            row = int(np.argmax(numbers < 0))
            raise ValueError(f"{split.store.name(row)}: {_reason(values[row], first, lookup)}")
        images[name] = LabelledImages(split.store, numbers)
    classes = found.classes or [str(value) for value in lookup]
    present = np.unique(images[first].labels)
    if len(present) < 2:
        raise ValueError(
            f"--data.path {where}: all {len(splits[first].store):,} training images are of one class,"
            f" {classes[present[0]]!r}; at least 2 classes are needed"
        )
    return ImageSource(images, classes)


def _values(split: RawSplit) -> list[int] | list[str]:
    labels = split.labels
    assert labels is not None
    values = labels.tolist() if isinstance(labels, np.ndarray) else list(labels)
    assert len(values) == len(split.store)
    return values


def _lookup(split: RawSplit, classes: list[str] | None) -> dict[int | str, int]:
    """Return class numbers by label: of the given classes, else of the labels that occur, in order (numbers as numbers)."""
    values = _values(split)
    if isinstance(values[0], str):
        names = {str(value) for value in values}
        as_numbers = all(name.isascii() and name.isdigit() for name in names)
        order = classes or sorted(names, key=lambda name: (int(name), name) if as_numbers else name)
        return {name: number for number, name in enumerate(order)}
    if classes:
        return {number: number for number in range(len(classes))}
    return {value: number for number, value in enumerate(sorted({int(value) for value in values if int(value) >= 0}))}


def _reason(value: int | str, first: str, lookup: dict[int | str, int]) -> str:
    if isinstance(value, int) and value < 0:
        return f"label {value} is negative; class numbers start at 0"
    shown = ", ".join(map(repr, list(lookup)[:10])) + (", ..." if len(lookup) > 10 else "")
    whose = " of the training split" if first == "train" else ""
    return f"label {value!r} is not one of the {len(lookup)} classes{whose} ({shown})"
