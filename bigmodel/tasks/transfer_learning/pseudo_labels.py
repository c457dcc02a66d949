"""Pseudo-labels (Lee 2013): confident predictions of an unlabelled file as additional training texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bigmodel.tasks.transfer_learning.prepare import PreparedTexts, prepare
from bigmodel.tasks.transfer_learning.problem_type import SINGLE_LABEL
from bigmodel.tasks.transfer_learning.sources import TextColumns, find_source
from bigmodel.tasks.transfer_learning.splits import Print
from bigmodel.tasks.transfer_learning.tokenization import TextEncoder


def prepare_predictions(path: str, paired: bool, encoder: TextEncoder, cache: Path) -> PreparedTexts:
    """Read the texts of a file that `bigmodel predict` wrote: columns `text`, `class`, `probability`, and `pair` for
    pairs.

    Raises:
        ValueError: if it is not such a file.
    """
    columns = TextColumns("text", "pair" if paired else None, "class", None, "probability")
    try:
        present = pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"--data.pseudo_labels {path} cannot be read as Parquet: {error}") from error
    missing = [name for name in vars(columns).values() if name is not None and name not in present]
    if missing:
        raise ValueError(
            f"--data.pseudo_labels {path} has the columns {present}, not {missing}: set it to a file that `bigmodel predict`"
            " wrote for a run of this task"
        )
    return prepare(find_source(path, columns=columns, cache=cache), columns, SINGLE_LABEL, encoder, cache)


def select_predictions(
    predicted: PreparedTexts,
    classes: list[str],
    min_confidence: float,
    labelled: np.ndarray,
    print_line: Print,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows [n] of confident predictions, and their class indices [n].

    Args:
        predicted: texts with predicted classes.
        classes: those of the labelled texts.
        min_confidence: minimum probability.
        labelled: contents of the labelled texts, of all splits, which are excluded.
        print_line: prints a summary.

    Raises:
        ValueError: if a class is unknown, or no text is left.
    """
    labels = predicted.labels
    assert labels is not None
    assert predicted.confidences is not None
    if unknown := [name for name in labels.names if name not in classes]:
        raise ValueError(
            f"--data.pseudo_labels has the classes {unknown[:10]}, which are not among the {len(classes)} of the labelled"
            " texts: set it to predictions of a run on these classes"
        )
    sure = np.flatnonzero(predicted.confidences >= min_confidence)
    rows = sure[~np.isin(predicted.contents[sure], labelled)]
    if not len(rows):
        raise ValueError(
            f"--data.pseudo_labels: of {len(predicted):,} predictions {len(sure):,} have a probability of at least"
            f" --data.min_confidence {min_confidence}, and all of these texts have a label: lower --data.min_confidence, or"
            " set --data.pseudo_labels null"
        )
    number = np.array([classes.index(name) for name in labels.names], np.int64)
    targets: np.ndarray = number[labels.values[rows]]
    counts = np.bincount(targets, minlength=len(classes)).tolist()
    each = ", ".join(f"{name} {count:,}" for name, count in list(zip(classes, counts, strict=True))[:10])
    print_line(
        f"pseudo-labels: {len(rows):,} of {len(predicted):,} predictions are added to the training texts, with a"
        f" probability of at least {min_confidence} ({each}); {len(sure) - len(rows):,} more are of texts that have a label"
    )
    return rows, targets
