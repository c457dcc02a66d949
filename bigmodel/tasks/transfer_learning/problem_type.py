"""Types of the targets, by the names of transformers' `problem_type`.

single_label_classification: one class per sample. multi_label_classification: any number of classes (labels) per sample.
regression: a number per sample.
"""

from __future__ import annotations

from typing import Final, Literal, cast

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
SINGLE_LABEL: Final = "single_label_classification"
MULTI_LABEL: Final = "multi_label_classification"
REGRESSION: Final = "regression"

# Names in checkpoints and caches of earlier versions.
_EARLIER: dict[str, ProblemType] = {"class": SINGLE_LABEL, "labels": MULTI_LABEL, "number": REGRESSION}


def read_problem_type(name: str) -> ProblemType:
    """Return a saved problem type, also one that was saved under its name of an earlier version."""
    return _EARLIER[name] if name in _EARLIER else cast(ProblemType, name)
