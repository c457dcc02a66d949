"""Names of splits, and validation of their shares. This module imports neither torch nor Lightning."""

from __future__ import annotations

import re

_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
SPLIT_WORDS = ", ".join(_NAMES)


def split_name(word: str) -> str | None:
    """Return `train`, `val` or `test` for one of their synonyms; None for any other word."""
    return _NAMES.get(word.strip().lower())


def split_in(name: str) -> str | None:
    """Return the split in a file's or split's name (train-00000-of-00002, sst2_dev, validation_matched).

    None if it contains no split, or several.
    """
    found = {split for word in re.split(r"[^a-zA-Z]+", name) if (split := split_name(word)) is not None}
    return found.pop() if len(found) == 1 else None


def check_shares(val: float, test: float) -> None:
    """Raise for invalid shares of the data for validation and test (--data.split.val, --data.split.test).

    Raises:
        ValueError: if one is not in [0, 1), or nothing is left to train on.
    """
    for name, share in (("val", val), ("test", test)):
        if not 0 <= share < 1:
            raise ValueError(f"--data.split.{name} {share} must be in [0, 1)")
    if val + test >= 1:
        raise ValueError(
            f"--data.split.val {val} and --data.split.test {test} leave nothing to train on: their sum must be below 1"
        )
