"""Assignment of documents to train, val and test: by content, by position, by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from bigmodel.data.split_shares import check_shares
from bigmodel.tasks.language_modeling.sources import Segment, TextFile, iter_text, matches


class TextSplit(ABC):
    """Assigns documents to train, val and test."""

    @abstractmethod
    def assign(self, files: Sequence[TextFile]) -> dict[str, list[Segment]]:
        """Return the segments of each requested split; train is always one."""


@dataclass(frozen=True)
class DocumentHashSplit(TextSplit):
    """Split by a hash of each document's content: stable when files are added, renamed or moved; copies stay together.

    Args:
        val: expected share of the documents in the validation split.
        test: expected share of the documents in the test split.
    """

    val: float = 0.05
    test: float = 0.0

    def __post_init__(self) -> None:
        check_shares(self.val, self.test)

    def assign(self, files: Sequence[TextFile]) -> dict[str, list[Segment]]:
        splits: dict[str, list[Segment]] = _empty_splits(self.val, self.test)
        for file in files:
            share = int(file.sha256[:16], 16) / 2**64
            name = "val" if share < self.val else "test" if share >= 1 - self.test else "train"
            splits[name].append(Segment(file, 0, file.size))
        return splits


@dataclass(frozen=True)
class ContiguousSplit(TextSplit):
    """Split by position in the concatenated files: first train, then val, then test, as in published runs on one text.

    A document on a boundary is divided, without end-of-text after its first part.

    Args:
        val: share of the characters in the validation split.
        test: share of the characters in the test split.
    """

    val: float = 0.1
    test: float = 0.0

    def __post_init__(self) -> None:
        check_shares(self.val, self.test)

    def assign(self, files: Sequence[TextFile]) -> dict[str, list[Segment]]:
        total = sum(file.characters for file in files)
        splits = _empty_splits(self.val, self.test)
        stops = {"train": int(total * (1 - self.val - self.test)), "val": int(total * (1 - self.test)), "test": total}
        first = 0  # characters before this file
        for file in files:
            start = 0  # bytes of this file that are already assigned
            for name in splits:
                characters = min(max(stops[name] - first, 0), file.characters)
                stop = file.size if characters == file.characters else _byte_offset(file, characters)
                if stop > start:
                    splits[name].append(Segment(file, start, stop))
                start = max(start, stop)
            first += file.characters
        return splits


@dataclass(frozen=True)
class FileSplit(TextSplit):
    """Split by file names; files that match no pattern are in the train split.

    Args:
        val: files of the validation split: paths, or patterns in which * also matches /.
        test: files of the test split, likewise.
    """

    val: list[str]
    test: list[str] = field(default_factory=list)

    def assign(self, files: Sequence[TextFile]) -> dict[str, list[Segment]]:
        splits: dict[str, list[Segment]] = _empty_splits(len(self.val), len(self.test))
        wanted = {"val": self.val, "test": self.test}
        for name, patterns in wanted.items():
            for pattern in patterns:
                if not any(matches(file, [pattern]) for file in files):
                    raise ValueError(
                        f"--data.split.{name} {pattern}: matches none of the {len(files)} files of --data.path"
                    )
        for file in files:
            names = [name for name, patterns in wanted.items() if matches(file, patterns)] or ["train"]
            if len(names) > 1:
                raise ValueError(f"{file.path} matches both --data.split.val and --data.split.test")
            splits[names[0]].append(Segment(file, 0, file.size))
        return splits


def _empty_splits(val: float, test: float) -> dict[str, list[Segment]]:
    return {name: [] for name, share in (("train", 1), ("val", val), ("test", test)) if share > 0}


def _byte_offset(file: TextFile, characters: int) -> int:
    """Return the byte offset after the first `characters` characters of the file."""
    offset = 0
    for block in iter_text(Segment(file, 0, file.size)):
        if characters <= len(block):
            return offset + len(block[:characters].encode())
        characters -= len(block)
        offset += len(block.encode())
    raise ValueError(f"{file.path} changed while it was read")
