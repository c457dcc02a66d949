"""Earlier names in YAML files, run directories and checkpoints, mapped to current names."""

from __future__ import annotations

import re
from typing import Any

# Earlier import path of a module or class: its current path. The longest match is used.
RENAMED = {
    "bigmodel.callbacks": "bigmodel.training.callbacks",
    "bigmodel.callbacks.Gradients": "bigmodel.training.callbacks.GradientScaling",
    "bigmodel.callbacks.Times": "bigmodel.training.callbacks.StepTimer",
    "bigmodel.checkpoint.Checkpoint": "bigmodel.training.callbacks.Checkpoint",
    "bigmodel.optim": "bigmodel.training.schedules",
    "bigmodel.tasks.language_modeling.ByDocument": "bigmodel.tasks.language_modeling.DocumentHashSplit",
    "bigmodel.tasks.language_modeling.ByFiles": "bigmodel.tasks.language_modeling.FileSplit",
    "bigmodel.tasks.language_modeling.ByPosition": "bigmodel.tasks.language_modeling.ContiguousSplit",
    "bigmodel.tasks.language_modeling.OfRun": "bigmodel.tasks.language_modeling.FromRun",
}
# Earlier class names of callbacks, the keys of their states in a checkpoint: current names.
RENAMED_CALLBACKS = {"Gradients": "GradientScaling", "Times": "StepTimer"}
_PATTERN = re.compile(rf"({'|'.join(re.escape(old) for old in sorted(RENAMED, key=len, reverse=True))})(?=\.|$)")


def current(tree: Any) -> Any:
    """Return a configuration, or a part of one, with paths of earlier versions replaced.

    Args:
        tree: plain values: mappings, lists, strings and numbers. It is not changed.
    """
    if isinstance(tree, str):
        return _PATTERN.sub(lambda found: RENAMED[found[1]], tree, count=1) if _PATTERN.match(tree) else tree
    if isinstance(tree, dict):
        return {key: current(value) for key, value in tree.items()}
    return [current(value) for value in tree] if isinstance(tree, list) else tree


def current_callbacks(states: dict[str, Any]) -> dict[str, Any]:
    """Return the states of callbacks in a checkpoint, keyed by the current names of their classes."""
    return {RENAMED_CALLBACKS.get(name, name): state for name, state in states.items()}
