"""Metadata of the data that a trained task needs: classes, problem type, scale of the targets, geometry of the inputs."""

from __future__ import annotations

from typing import Any

from bigmodel.data.cache import first_of
from bigmodel.tasks.transfer_learning.problem_type import SINGLE_LABEL, read_problem_type

_GEOMETRY = ("max_length", "size", "resize")


def collect_metadata(data: Any) -> dict[str, Any]:
    """Return the metadata of a data module, as plain values.

    Args:
        data: has `classes`; and, where they apply, `problem_type` (by default single-label), `target_statistics()`, and
            `max_length` for texts, or `size` and `resize` for images.
    """
    center, scale = data.target_statistics() if hasattr(data, "target_statistics") else (0.0, 1.0)
    return {
        "classes": list(data.classes),
        "problem_type": getattr(data, "problem_type", SINGLE_LABEL),
        "center": center,
        "scale": scale,
        **{name: getattr(data, name) for name in _GEOMETRY if hasattr(data, name)},
    }


def read_metadata(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata in a checkpoint; in those of earlier versions its keys are `facts` and `problem`."""
    metadata = dict(saved["data_metadata"] if "data_metadata" in saved else saved["facts"])
    if "problem" in metadata:
        metadata["problem_type"] = metadata.pop("problem")
    return metadata | {"problem_type": read_problem_type(metadata["problem_type"])}


def check_targets(metadata: dict[str, Any], saved: dict[str, Any]) -> None:
    """Check that data have the same targets as a checkpoint.

    Raises:
        ValueError: if their problem type or their classes differ.
    """
    if any(metadata[key] != saved[key] for key in ("problem_type", "classes")):
        raise ValueError(
            f"--data has other targets than the data of this run: {_describe(metadata)}, not {_describe(saved)}: set"
            " --data.path and --data.label_column to those of the run"
        )


def _describe(metadata: dict[str, Any]) -> str:
    names = metadata["classes"]
    return f"{metadata['problem_type']}{f' ({first_of(names, 8)})' if names else ''}"
