"""Classes and targets of the texts of a split.

B texts of a batch, K classes, L labels of all texts together, N texts of a split.
"""

from __future__ import annotations

import numpy as np

from bigmodel.tasks.transfer_learning.labels import Labels
from bigmodel.tasks.transfer_learning.prepare import PreparedTexts
from bigmodel.tasks.transfer_learning.problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL

UNKNOWN = -1  # the class of a text without a label
_SHOWN = 5


class MultiHotTargets:
    """Multi-label targets; `[rows]` returns 0 and 1, [B, K] float32.

    Args:
        values: [L] class indices of all texts, concatenated.
        counts: [N] number of classes of each text.
        num_classes: K.
    """

    def __init__(self, values: np.ndarray, counts: np.ndarray, num_classes: int) -> None:
        self.values, self.num_classes = values, num_classes
        self._offsets = np.concatenate([[0], np.cumsum(counts)])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        targets = np.zeros((len(rows), self.num_classes), np.float32)
        for target, row in zip(targets, rows.tolist(), strict=True):
            target[self.values[self._offsets[row] : self._offsets[row + 1]]] = 1
        return targets


def training_classes(prepared: PreparedTexts, rows: dict[str, np.ndarray]) -> list[str]:
    """Return the names of the classes of the training texts, in order; [] for regression.

    Raises:
        ValueError: if there are fewer than two, or another split has further ones.
    """
    labels = prepared.labels
    assert labels is not None
    if labels.problem_type == REGRESSION:
        return []
    present = np.unique(labels.of(rows["train"])[0])
    for name, which in rows.items():
        values, counts = labels.of(which)
        if (unknown := ~np.isin(values, present)).any():
            row = int(np.repeat(which, counts)[np.argmax(unknown)])
            classes = [labels.names[i] for i in np.unique(values[unknown])]
            raise ValueError(
                f"{prepared.name(row)}: the class {labels.names[values[np.argmax(unknown)]]!r} of the {name} split has no"
                f" training text ({len(classes):,} such classes: {', '.join(map(repr, classes[:_SHOWN]))}): add training"
                " texts, or remove these"
            )
    if len(present) < 2 and labels.problem_type == SINGLE_LABEL:
        raise ValueError(
            f"the training texts have the class {labels.names[present[0]]!r} only: at least 2 classes are required"
        )
    return [labels.names[i] for i in present.tolist()]


def select_targets(labels: Labels, classes: list[str], rows: np.ndarray) -> np.ndarray | MultiHotTargets:
    """Return the targets, which a batch indexes with its rows."""
    values, counts = labels.of(rows)
    if labels.problem_type == REGRESSION:
        return values
    number = np.full(len(labels.names), UNKNOWN)
    number[[labels.names.index(name) for name in classes]] = np.arange(len(classes))
    return (
        MultiHotTargets(number[values], counts, len(classes)) if labels.problem_type == MULTI_LABEL else number[values]
    )
