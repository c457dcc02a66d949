"""Stratified splits by content: independent of names, places and dates of files, so the same on every machine.

Samples of equal content form a group, which is never divided. A group belongs to one stratum, usually a class. Within a
stratum the groups are sorted by a rank that depends on their content alone: the first are the test split, the last the
validation split, and the rest is for training. So adding, removing or renaming a sample moves at most two others, none
moves from test to validation or back, and changing one share does not change the other split.

This module imports neither torch nor Lightning. N samples, U groups, S strata.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

_SHOWN = 10


@dataclass(frozen=True)
class Groups:
    """Samples grouped by content, and the groups sorted by stratum.

    Attributes:
        of_sample: [N] int64, the group of each sample.
        order: [U] int64, the groups by stratum, and within it by rank.
        strata: [S] int64, in ascending order.
        bounds: [S + 1], first position in `order` of each stratum, and U.
    """

    of_sample: np.ndarray
    order: np.ndarray
    strata: np.ndarray
    bounds: list[int]

    @property
    def sizes(self) -> dict[int, int]:
        """Number of groups by stratum."""
        return dict(zip(self.strata.tolist(), np.diff(self.bounds).tolist(), strict=True))


def group_by_stratum(
    contents: np.ndarray, strata: np.ndarray, rank: Callable[[np.ndarray], np.ndarray] | None = None
) -> Groups:
    """Group samples by content and sort the groups by stratum.

    Args:
        contents: [N] hashes of the samples' contents, of any type that can be sorted.
        strata: [N] int64, the stratum of each sample; a group is in the lowest of its samples.
        rank: returns the ranks [U] of different contents [U]; None: they are ranked by their hashes.
    """
    different, of_sample = np.unique(contents, return_inverse=True)
    owner = np.full(len(different), np.iinfo(np.int64).max)
    np.minimum.at(owner, of_sample, strata)
    order = np.lexsort((np.arange(len(different)) if rank is None else rank(different), owner))
    bounds = np.flatnonzero(np.diff(owner[order], prepend=-2, append=-2))
    return Groups(of_sample, order, owner[order][bounds[:-1]], bounds.tolist())


def assign_splits(
    groups: Groups, val: float, test: float, min_groups: int, fold: tuple[int, int] | None = None
) -> np.ndarray:
    """Return the split [N] of each sample: train, val or test.

    The number of groups of a stratum in a split is its share, rounded to the nearest.

    Args:
        groups: of the samples.
        val: share of each stratum for validation, at least 0 (no such split) and below 1.
        test: share of each stratum for test, likewise.
        min_groups: a stratum with at least this number of groups has at least one in each split.
        fold: number of a fold of a cross-validation, and number of folds: groups outside of the test split are assigned
            to the folds in turn, stratum after stratum, and this fold is the validation split; None: no folds.
    """

    def count(share: float, size: int) -> int:
        return max(int(share * size + 0.5), int(share > 0 and size >= min_groups))

    split = np.full(len(groups.order), "train", dtype="<U5")
    turn = 0
    for start, stop in pairwise(groups.bounds):
        first = start + count(test, stop - start)
        split[groups.order[start:first]] = "test"
        if fold is None:
            split[groups.order[stop - count(val, stop - start) : stop]] = "val"
        else:
            number, num_folds = fold
            split[groups.order[first:stop][(turn + np.arange(stop - first)) % num_folds == number]] = "val"
            turn += stop - first
    return split[groups.of_sample]


def draw_shots(
    samples: np.ndarray, labels: np.ndarray, classes: Mapping[int, str], shots: int, unit: str
) -> np.ndarray:
    """Return the first `shots` samples of each class, each once and in ascending order.

    Args:
        samples: [N] int64, numbers of samples in a random order that depends on a seed, so that fewer shots are a subset
            of more. A sample with several labels is there once for each.
        labels: [N] their class numbers.
        classes: names by class number.
        shots: samples of each class, see --data.shots.
        unit: name of the samples in messages, such as images.

    Raises:
        ValueError: if `shots` is below 1, or a class has fewer samples.
    """
    if shots < 1:
        raise ValueError(f"--data.shots {shots}: at least 1 is needed ({unit} of each class)")
    order = np.argsort(labels, kind="stable")
    samples, labels = samples[order], labels[order]
    starts, stops = (np.searchsorted(labels, np.array(list(classes)), side) for side in ("left", "right"))
    sizes = dict(zip(classes.values(), (stops - starts).tolist(), strict=True))
    if few := {name: size for name, size in sizes.items() if size < shots}:
        shown = ", ".join(f"{name!r} has {size:,}" for name, size in list(few.items())[:_SHOWN])
        raise ValueError(
            f"--data.shots {shots}: {len(few):,} of {len(classes):,} classes have fewer different training {unit}:"
            f" {shown}; set at most {min(few.values()):,}"
        )
    return np.unique(np.concatenate([samples[start : start + shots] for start in starts.tolist()]))
