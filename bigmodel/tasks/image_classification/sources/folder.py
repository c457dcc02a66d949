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
            raise ValueError(
                f"--data.path {root}: no images in this folder{finder.describe_others()}. Accepted are {KINDS}"
            )
        found, classes = {"all": RawSplit(FileStore(root, names), None)}, []
    finder.report_skipped()
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
    splits_by_folder = {folder: split_name(folder) for folder in folders}
    if "train" not in splits_by_folder.values():
        return {"all": ""}
    if others := [folder for folder in folders if not splits_by_folder[folder]]:
        say(
            f"{root}: its folders are read as classes, not splits, because {others[:5]} are not names of a split"
            f" (accepted: {SPLIT_WORDS})"
        )
        return {"all": ""}
    splits: dict[str, str] = {}
    for folder, split in splits_by_folder.items():
        assert split is not None
        if split in splits:
            raise ValueError(
                f"--data.path {root}: the folders {splits[split]} and {folder} are both the split {split}; remove one"
            )
        splits[split] = folder
    return splits


class _Finder:
    """Search of images below a root; counts the files that are skipped."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.suffixes = image_suffixes()
        self.others: Counter[str] = Counter()
        self.unlabelled: list[str] = []

    def labelled(self, split: str) -> tuple[list[str], list[str]]:
        """Return names below the root and classes of a split's images."""
        here = os.path.join(self.root, split) if split else self.root
        names: list[str] = []
        labels: list[str] = []
        for entry in _entries(here):
            below = f"{split}/{entry.name}" if split else entry.name
            if not entry.is_dir():
                self._take(below, self.unlabelled)
                continue
            inside = sorted(self.under(below))
            if not inside:
                raise ValueError(
                    f"--data.path {self.root}: the class folder {below} has no images{self.describe_others()};"
                    " add images or remove it"
                )
            names += inside
            labels += [entry.name] * len(inside)
        if not labels:
            unlabelled = f", only {len(self.unlabelled):,} images without labels" if self.unlabelled else ""
            raise ValueError(
                f"--data.path {self.root}: {split or 'the folder'} has no class folders"
                f"{unlabelled or self.describe_others()}. Accepted are {KINDS}"
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

    def describe_others(self) -> str:
        """Describe files that are not images, for a message."""
        what = ", ".join(f"{suffix} ({count:,})" for suffix, count in self.others.most_common(5))
        return f" (other files: {what})" if what else ""

    def report_skipped(self) -> None:
        if self.others:
            say(f"{self.root}: skipped {self.others.total():,} files that are not images{self.describe_others()}")
        if self.unlabelled:
            say(
                f"{self.root}: skipped {len(self.unlabelled):,} images outside of class folders: {self.unlabelled[0]}, ..."
            )
