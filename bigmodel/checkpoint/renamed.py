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
    # Transfer learning.
    "bigmodel.tasks.transfer_learning.Full": "bigmodel.tasks.transfer_learning.FullFineTuning",
    "bigmodel.tasks.transfer_learning.Gradual": "bigmodel.tasks.transfer_learning.GradualUnfreezing",
    "bigmodel.tasks.transfer_learning.L1": "bigmodel.tasks.transfer_learning.L1Penalty",
    "bigmodel.tasks.transfer_learning.L2SP": "bigmodel.tasks.transfer_learning.L2SPPenalty",
    "bigmodel.tasks.transfer_learning.Split": "bigmodel.tasks.transfer_learning.TextSplit",
    "bigmodel.tasks.transfer_learning.methods.Full": "bigmodel.tasks.transfer_learning.methods.FullFineTuning",
    "bigmodel.tasks.transfer_learning.methods.Gradual": "bigmodel.tasks.transfer_learning.methods.GradualUnfreezing",
    "bigmodel.tasks.transfer_learning.methods.base.Full": "bigmodel.tasks.transfer_learning.methods.base.FullFineTuning",
    "bigmodel.tasks.transfer_learning.methods.gradual.Gradual": (
        "bigmodel.tasks.transfer_learning.methods.gradual.GradualUnfreezing"
    ),
    "bigmodel.tasks.transfer_learning.penalties.L1": "bigmodel.tasks.transfer_learning.penalties.L1Penalty",
    "bigmodel.tasks.transfer_learning.penalties.L2SP": "bigmodel.tasks.transfer_learning.penalties.L2SPPenalty",
    "bigmodel.tasks.transfer_learning.splits.Split": "bigmodel.tasks.transfer_learning.splits.TextSplit",
}
_PROBLEM_TYPES = {
    "class": "single_label_classification",
    "labels": "multi_label_classification",
    "number": "regression",
}
# Current class path: its arguments by their earlier names. One block for each room or task.
RENAMED_ARGUMENTS: dict[str, dict[str, str]] = {
    # Transfer learning.
    "bigmodel.tasks.transfer_learning.TransferLearning": {"excuse": "ignore_mismatched"},
    "bigmodel.tasks.transfer_learning.module.TransferLearning": {"excuse": "ignore_mismatched"},
    "bigmodel.tasks.transfer_learning.LabelledTextData": {"problem": "problem_type"},
    "bigmodel.tasks.transfer_learning.data.LabelledTextData": {"problem": "problem_type"},
}
# Current class path: by argument, earlier values of it (short names such as those of a Literal) and current ones.
RENAMED_VALUES: dict[str, dict[str, dict[str, str]]] = {
    # Transfer learning.
    "bigmodel.tasks.transfer_learning.LabelledTextData": {"problem_type": _PROBLEM_TYPES},
    "bigmodel.tasks.transfer_learning.data.LabelledTextData": {"problem_type": _PROBLEM_TYPES},
}
# Earlier class names of callbacks, the keys of their states in a checkpoint: current names.
RENAMED_CALLBACKS = {"Gradients": "GradientScaling", "Times": "StepTimer"}
_PATTERN = re.compile(rf"({'|'.join(re.escape(old) for old in sorted(RENAMED, key=len, reverse=True))})(?=\.|$)")


def current(tree: Any) -> Any:
    """Return a configuration, or a part of one, with names of earlier versions replaced.

    Args:
        tree: plain values: mappings, lists, strings and numbers. It is not changed.
    """
    if isinstance(tree, str):
        return _PATTERN.sub(lambda found: RENAMED[found[1]], tree, count=1) if _PATTERN.match(tree) else tree
    if isinstance(tree, list):
        return [current(value) for value in tree]
    if not isinstance(tree, dict):
        return tree
    tree = {key: current(value) for key, value in tree.items()}
    arguments = tree.get("init_args")
    if isinstance(arguments, dict):
        tree["init_args"] = _current_arguments(str(tree.get("class_path")), arguments)
    return tree


def _current_arguments(class_path: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a class under current names; a value under an earlier name takes precedence."""
    names, values = RENAMED_ARGUMENTS.get(class_path, {}), RENAMED_VALUES.get(class_path, {})
    given = {key: value for key, value in arguments.items() if key not in names}
    given |= {names[key]: value for key, value in arguments.items() if key in names}
    for key in values.keys() & given.keys():
        if isinstance(value := given[key], str):
            given[key] = values[key].get(value, value)
    return given


def find_renamed(tree: Any, key: str = "") -> str | None:
    """Describe the first argument under an earlier name in a configuration, as flags; None if there is none.

    Args:
        tree: as for `current`, with current class paths.
        key: its place in the whole configuration, such as `model.net`.
    """
    if not isinstance(tree, dict):
        return None
    path, arguments = str(tree.get("class_path")), tree.get("init_args")
    for name, value in arguments.items() if isinstance(arguments, dict) else ():
        if (now := RENAMED_ARGUMENTS.get(path, {}).get(name)) is not None:
            return f"--{key}.{name} is now --{key}.{now}"
        if isinstance(value, str) and (now := RENAMED_VALUES.get(path, {}).get(name, {}).get(value)) is not None:
            return f"--{key}.{name} {value} is now --{key}.{name} {now}"
    inner = ((key if name == "init_args" else f"{key}.{name}".lstrip("."), value) for name, value in tree.items())
    return next((found for place, value in inner if (found := find_renamed(value, place)) is not None), None)


def current_callbacks(states: dict[str, Any]) -> dict[str, Any]:
    """Return the states of callbacks in a checkpoint, keyed by the current names of their classes."""
    return {RENAMED_CALLBACKS.get(name, name): state for name, state in states.items()}
