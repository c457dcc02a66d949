"""Folders of image files: `<root>/<class>/...`, or `<root>/<split>/<class>/...` where every folder of the root is a
split.

Order: classes by name, within a class files by their path below it.
"""

from __future__ import annotations

import os
from collections import Counter

from PIL import Image

from bigmodel.data.cache import say
from bigmodel.data.image_decoding import FORMATS
from bigmodel.tasks.image_classification.sources.dataset_index import (
    KINDS,
    SPLIT_WORDS,
    RawDataset,
    RawSplit,
    split_name,
)
from bigmodel.tasks.image_classification.sources.image_storage import FileStore


def image_suffixes() -> set[str]:
    """Return the suffixes of the supported formats, in lower case with their dot."""
    Image.init()
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS and kind in Image.OPEN}


def read_folder(root: str, labelled: bool) -> RawDataset:
    """Read the images below a folder, each labelled by the folder of its class; or all of them, without labels.

    Raises:
        ValueError: if a folder cannot be read or a class folder is empty, or there are no images, or no class folders.
    """
    finder = _Finder(root)
    if labelled:
        folders = [entry.name for entry in _entries(root) if entry.is_dir()]
        splits = {name: finder.labelled(below) for name, below in _split_folders(root, folders).items()}
        classes = sorted(set(splits["train" if "train" in splits else "all"][1]))
        found = {name: RawSplit(FileStore(root, names), labels) for name, (names, labels) in splits.items()}
    else:
        names = sorted(finder.under(""))
        if not names:
            raise ValueError(f"--data.path {root}: no images in this folder{finder.others_there()}. Known are {KINDS}")
        found, classes = {"all": RawSplit(FileStore(root, names), None)}, []
    finder.say_what_was_left_out()
    return RawDataset(root, found, classes)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".") and entry.name != "__MACOSX"]
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {error.strerror}") from error
    return sorted(shown, key=lambda entry: entry.name)


def _split_folders(root: str, folders: list[str]) -> dict[str, str]:
    """Return the folder below the root that holds the classes of each split; "" is the root."""
    meant = {folder: split_name(folder) for folder in folders}
    if "train" not in meant.values():
        return {"all": ""}
    if strange := [folder for folder in folders if not meant[folder]]:
        say(
            f"{root}: its folders are taken for classes, not splits, since {strange[:5]} mean no split"
            f" (known are {SPLIT_WORDS})"
        )
        return {"all": ""}
    splits: dict[str, str] = {}
    for folder, split in meant.items():
        assert split is not None
        if split in splits:
            raise ValueError(
                f"--data.path {root}: the folders {splits[split]} and {folder} both mean the split {split}"
            )
        splits[split] = folder
    return splits


class _Finder:
    """Finds images below a root, and counts the files that are left out."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.suffixes = image_suffixes()
        self.others: Counter[str] = Counter()
        self.loose: list[str] = []

    def labelled(self, split: str) -> tuple[list[str], list[str]]:
        """Return names below the root and classes of a split's images."""
        here = os.path.join(self.root, split) if split else self.root
        names: list[str] = []
        labels: list[str] = []
        for entry in _entries(here):
            below = f"{split}/{entry.name}" if split else entry.name
            if not entry.is_dir():
                self._take(below, self.loose)
                continue
            inside = sorted(self.under(below))
            if not inside:
                raise ValueError(
                    f"--data.path {self.root}: the class folder {below} has no images{self.others_there()};"
                    " fill it or remove it"
                )
            names += inside
            labels += [entry.name] * len(inside)
        if not labels:
            raise ValueError(
                f"--data.path {self.root}: {split or 'it'} has no class folders"
                + (f", only {len(self.loose):,} images without labels" if self.loose else self.others_there())
                + f". Known are {KINDS}"
            )
        return names, labels

    def under(self, below: str) -> list[str]:
        """Return names below the root of all images at any depth under one of its folders, unordered."""
        names: list[str] = []
        folder = os.path.join(self.root, below) if below else self.root
        for entry in _entries(folder):
            name = f"{below}/{entry.name}" if below else entry.name
            if not entry.is_dir():
                self._take(name, names)
                continue
            if entry.is_symlink() and f"{os.path.realpath(folder)}/".startswith(f"{os.path.realpath(entry.path)}/"):
                raise ValueError(f"{entry.path} links to a folder above itself; remove the link")
            names += self.under(name)
        return names

    def _take(self, name: str, names: list[str]) -> None:
        suffix = os.path.splitext(name)[1].lower()
        if suffix in self.suffixes:
            names.append(name)
        else:
            self.others[suffix or "no suffix"] += 1

    def others_there(self) -> str:
        """Describe the other files that were found, for an error."""
        what = ", ".join(f"{suffix} ({count:,})" for suffix, count in self.others.most_common(5))
        return f" (other files are there: {what})" if what else ""

    def say_what_was_left_out(self) -> None:
        if self.others:
            say(f"{self.root}: {self.others.total():,} files are left out as no images{self.others_there()}")
        if self.loose:
            say(f"{self.root}: {len(self.loose):,} images in no class folder are left out, such as {self.loose[0]}")
