"""Splits of texts: shares, folds of a cross-validation, a few training examples of each class.

Within each class the contents (equal texts are one content) are sorted by a hash of content and seed, which does not
depend on position or other texts. The first are the test split, the last the validation split, and the rest is for
training. So adding or removing a text moves at most two others, and none from test to validation or back. With k folds,
the contents after the test split are assigned to the folds in turn, class after class. Multi-label texts are sorted by
their rarest label; regression targets have no classes.

N texts, U contents, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bigmodel.data import stratified_splits
from bigmodel.data.split_shares import check_shares
from bigmodel.data.stateless_rng import hash_seed, random_bits
from bigmodel.data.stratified_splits import Groups, assign_splits, group_by_stratum
from bigmodel.tasks.transfer_learning.labels import Labels
from bigmodel.tasks.transfer_learning.prepare import SPLITS, PreparedTexts
from bigmodel.tasks.transfer_learning.problem_type import REGRESSION, SINGLE_LABEL

_SPLIT_STREAM, _SHOT_STREAM = 1, 2  # streams of random numbers, so that the draws are independent
_SHOWN = 10

Print = Callable[[str], None]  # prints a line


@dataclass
class TextSplit:
    """Shares of texts of each class for validation and test, where the data have no such splits.

    Args:
        val: share of each class for validation, at least 0 (no such split) and below 1.
        test: share of each class for test, likewise.
        seed: selects other texts; not --data.seed, so that runs of several seeds are evaluated on the same texts.
    """

    val: float = 0.1
    test: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_shares(self.val, self.test)


@dataclass(frozen=True)
class Folds:
    """A k-fold cross-validation, and the index of its validation fold."""

    count: int
    number: int

    def __post_init__(self) -> None:
        if self.count < 2:
            raise ValueError(f"--data.folds {self.count}: at least 2 are needed")
        if not 0 <= self.number < self.count:
            raise ValueError(
                f"--data.fold {self.number}: 0 to {self.count - 1} is accepted with --data.folds {self.count}"
            )


def divide(prepared: PreparedTexts, split: TextSplit, folds: Folds | None, print_line: Print) -> dict[str, np.ndarray]:
    """Return rows [n] int64 of each split, ascending: those of the data; missing splits are drawn from the training
    split.

    Raises:
        ValueError: if a class has too few contents to be in all splits, or a split gets none.
    """
    assert prepared.labels is not None
    labels = prepared.labels
    rows = _given(prepared, print_line)
    shares = {name: share for name, share in (("val", split.val), ("test", split.test)) if name not in rows and share}
    if folds is not None:
        shares.pop("val", None)
        rows["train"] = np.union1d(rows["train"], rows.pop("val", np.empty(0, np.int64)))
    if not shares and folds is None:
        return rows
    pool = rows["train"]
    groups = group_by_stratum(
        prepared.contents[pool],
        _strata(labels, pool),
        lambda contents: random_bits(contents, hash_seed(_SPLIT_STREAM, split.seed), 1)[:, 0],
    )
    if labels.problem_type == SINGLE_LABEL:
        _check_classes(labels, groups, 1 + len(shares) + (folds is not None), folds)
    fold = None if folds is None else (folds.number, folds.count)
    assigned = assign_splits(groups, shares.get("val", 0.0), shares.get("test", 0.0), 1 + len(shares), fold)
    wanted = ["train", *shares, *(["val"] if folds is not None else [])]
    for name in wanted:
        rows[name] = pool[assigned == name]
        if len(rows[name]) == 0:
            raise ValueError(
                f"the {name} split receives none of the {len(pool):,} texts: add texts, or set other shares by"
                " --data.split.val and --data.split.test"
            )
    return {name: rows[name] for name in ("train", "val", "test") if name in rows}


def _given(prepared: PreparedTexts, print_line: Print) -> dict[str, np.ndarray]:
    """Return rows of each split as given in the data; all in train if none are given."""
    labels = prepared.labels
    assert labels is not None
    rows = {name: found for i, name in enumerate(SPLITS) if len(found := np.flatnonzero(prepared.splits == i))}
    if "train" not in rows:
        if named := [name for name in rows if name != "all"]:
            print_line(f"the data have no training split, only {', '.join(named)}; new splits are drawn from all texts")
        rows = {"train": np.arange(len(prepared))}
    for name in list(rows):
        unlabelled = (
            rows[name][labels.values[rows[name]] < 0] if labels.problem_type == SINGLE_LABEL else rows[name][:0]
        )
        if not len(unlabelled):
            continue
        if name != "train" and len(unlabelled) == len(rows[name]):
            print_line(f"the {name} split has no labels (all are -1) and is left out")
            del rows[name]
            continue
        raise ValueError(
            f"{len(unlabelled):,} texts of the {name} split have no label, the first in {prepared.name(int(unlabelled[0]))}:"
            " remove them"
        )
    return rows


def _strata(labels: Labels, pool: np.ndarray) -> np.ndarray:
    """Return the class [n] by which each text of these rows is stratified."""
    if labels.problem_type == SINGLE_LABEL:
        return labels.values[pool].astype(np.int64)
    if labels.offsets is None:
        return np.zeros(len(pool), np.int64)
    counts = np.bincount(labels.values, minlength=len(labels.names))
    rank = np.argsort(np.argsort(counts, kind="stable"), kind="stable")  # of each label, the rarest first
    strata = np.full(len(labels.offsets) - 1, len(rank))
    np.minimum.at(strata, np.repeat(np.arange(len(strata)), np.diff(labels.offsets)), rank[labels.values])
    return strata[pool].astype(np.int64)


def _check_classes(labels: Labels, groups: Groups, needed: int, folds: Folds | None) -> None:
    """Check that each class can be in all splits."""
    sizes = {labels.names[number]: size for number, size in groups.sizes.items()}
    few = {name: size for name, size in sizes.items() if size < needed}
    if few:
        shown = ", ".join(f"{name!r} has {size}" for name, size in list(few.items())[:_SHOWN])
        flags = "set --data.split.val or --data.split.test to 0" if folds is None else "leave out --data.folds"
        raise ValueError(
            f"{len(few):,} of {len(sizes):,} classes have fewer different texts than the {needed} splits, each of which"
            f" needs one: {shown}{', ...' if len(few) > _SHOWN else ''}. Add texts, remove these classes, or {flags}. If"
            f" nearly every text has a class of its own, set --data.label_column or --data.problem_type {REGRESSION}"
        )


def draw_shots(prepared: PreparedTexts, rows: np.ndarray, classes: list[str], shots: int, seed: int) -> np.ndarray:
    """Return `shots` different training texts of each class, from these rows.

    They are the first in an order that depends on the seed, so that fewer shots are a subset of more. If multi-label,
    each label has at least this number of texts.

    Raises:
        ValueError: if a class has fewer, or there are no classes.
    """
    labels = prepared.labels
    assert labels is not None
    if labels.problem_type == REGRESSION:
        raise ValueError(
            f"--data.shots {shots} requires classes, and --data.problem_type is {REGRESSION}: set --data.shots null"
        )
    _, first = np.unique(prepared.contents[rows], return_index=True)  # one row of each content
    rows = rows[first]
    rows = rows[np.argsort(random_bits(prepared.contents[rows], hash_seed(_SHOT_STREAM, seed), 1)[:, 0], kind="stable")]
    values, counts = labels.of(rows)
    named = {labels.names.index(name): name for name in classes}
    return stratified_splits.draw_shots(np.repeat(rows, counts), values, named, shots, "texts")


def report_duplicates(prepared: PreparedTexts, rows: dict[str, np.ndarray], print_line: Print) -> None:
    """Report repeated texts: with other labels, or in a split that is excluded from training."""
    labels = prepared.labels
    assert labels is not None
    used = np.concatenate(list(rows.values()))
    contents, content, counts = np.unique(prepared.contents[used], return_inverse=True, return_counts=True)
    if len(contents) < len(used):
        marks = _marks(labels)[used]
        order = np.lexsort((marks, content))
        change = (np.diff(content[order]) == 0) & (np.diff(marks[order]) != 0)
        num_contradicting = len(np.unique(content[order][1:][change]))
        print_line(
            f"{(counts > 1).sum():,} of {len(contents):,} different texts occur more than once,"
            f" {num_contradicting:,} of them with contradicting labels; all are used"
        )
    for name in ("val", "test"):
        if name in rows and (
            seen := int(np.isin(prepared.contents[rows[name]], prepared.contents[rows["train"]]).sum())
        ):
            print_line(f"{seen:,} of {len(rows[name]):,} texts of the {name} split are in the train split too")


def _marks(labels: Labels) -> np.ndarray:
    """Return [N] numbers that differ where labels do."""
    if labels.offsets is None:
        return labels.values
    sums = np.concatenate([[0], np.cumsum(random_bits(labels.values.astype(np.int64), 0, 1)[:, 0])])
    marks: np.ndarray = sums[labels.offsets[1:]] - sums[labels.offsets[:-1]]
    return marks
