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
    "bigmodel.tasks.distillation.terms": "bigmodel.tasks.distillation.loss_terms",
    "bigmodel.tasks.language_modeling.ByDocument": "bigmodel.tasks.language_modeling.DocumentHashSplit",
    "bigmodel.tasks.language_modeling.ByFiles": "bigmodel.tasks.language_modeling.FileSplit",
    "bigmodel.tasks.language_modeling.ByPosition": "bigmodel.tasks.language_modeling.ContiguousSplit",
    "bigmodel.tasks.language_modeling.OfRun": "bigmodel.tasks.language_modeling.FromRun",
    # Recommendation.
    "bigmodel.tasks.recommendation.FittedRecommendation": "bigmodel.tasks.recommendation.NonNeuralRecommendation",
    "bigmodel.tasks.recommendation.SequenceRecommendation": "bigmodel.tasks.recommendation.SequentialRecommendation",
    "bigmodel.tasks.recommendation.module.SequenceRecommendation": (
        "bigmodel.tasks.recommendation.module.SequentialRecommendation"
    ),
    "bigmodel.tasks.recommendation.non_neural.FittedRecommendation": (
        "bigmodel.tasks.recommendation.non_neural.NonNeuralRecommendation"
    ),
}
# Transfer learning: by the path of the package and by those of the modules.
RENAMED |= {
    f"bigmodel.tasks.transfer_learning.{folder}{old}": f"bigmodel.tasks.transfer_learning.{folder}{new}"
    for old, new, folders in (
        ("Full", "FullFineTuning", ("", "methods.", "methods.base.")),
        ("Gradual", "GradualUnfreezing", ("", "methods.", "methods.gradual.")),
        ("L1", "L1Penalty", ("", "penalties.")),
        ("L2SP", "L2SPPenalty", ("", "penalties.")),
        ("Split", "TextSplit", ("", "splits.")),
    )
    for folder in folders
}
# Image classification: by the path of the package and by that of the module.
RENAMED |= {
    f"bigmodel.tasks.image_classification.{old}": f"bigmodel.tasks.image_classification.{new}"
    for new, paths in {
        "ImageColumns": ("Columns", "sources.Columns", "sources.columns.Columns"),
        "ImageSplit": ("Split", "splits.Split"),
        "MixupCutMix": ("Mix", "mixup.Mix"),
        "RandomFlip": ("Flip", "geometry.Flip"),
        "RandomGrayscale": ("Grayscale", "color.Grayscale"),
        "TrivialAugmentWide": ("TrivialAugment", "auto_augment.TrivialAugment"),
    }.items()
    for old in paths
}
# Current class path: its arguments by their earlier names. One block for each room or task.
_CALLBACKS = {  # of training, by module and class
    "anomalies.Anomalies": {
        "on_nan": "on_nonfinite",
        "deviations": "spike_threshold_std",
        "most_returns": "max_rollbacks",
    },
    "checkpoint.Checkpoint": {"keep": "save_top_k"},
    "progress.ProgressLine": {"every_seconds": "every_n_seconds"},
    "swa.SWA": {"start": "start_fraction", "bn_batches": "num_bn_batches"},
    "watchdog.Watchdog": {"minutes": "timeout_minutes"},
}
RENAMED_ARGUMENTS: dict[str, dict[str, str]] = {
    **{f"bigmodel.training.callbacks.{path}": names for path, names in _CALLBACKS.items()},
    **{f"bigmodel.training.callbacks.{path.partition('.')[2]}": names for path, names in _CALLBACKS.items()},
}
# Image classification: by the path of the package and by that of the module.
RENAMED_ARGUMENTS |= {
    f"bigmodel.tasks.image_classification.{path}": arguments
    for paths, arguments in (
        (
            ("ImageData", "data.ImageData"),
            {
                "decoded": "cache_decoded",
                "on_bad": "on_corrupt",
                "on_device": "cache_on_device",
                "views": "num_augmentation_epochs",
            },
        ),
        (("HuggingFace", "hugging_face.HuggingFace"), {"excuse": "ignore_mismatched"}),
        (("MixupCutMix", "mixup.MixupCutMix"), {"cutmix": "cutmix_alpha", "mixup": "mixup_alpha"}),
        (("RandAugment", "auto_augment.RandAugment"), {"num_bins": "num_magnitude_bins"}),
        (("RandomCrop", "geometry.RandomCrop"), {"mode": "padding_mode"}),
        (("TrivialAugmentWide", "auto_augment.TrivialAugmentWide"), {"num_bins": "num_magnitude_bins"}),
    )
    for path in paths
}
_RECOMMENDATION = {"cutoffs": "topk", "sampled_negatives": "num_eval_negatives"}
_NON_NEURAL = {**_RECOMMENDATION, "decay": "recency_decay"}
_SEQUENTIAL = {**_RECOMMENDATION, "mask_last_rate": "mask_last_ratio", "mask_rate": "mask_ratio"}
RENAMED_ARGUMENTS |= {
    # Language modeling.
    "bigmodel.tasks.language_modeling.Pretrained": {"end_of_text": "eos_token"},
    "bigmodel.tasks.language_modeling.tokenizer_config.Pretrained": {"end_of_text": "eos_token"},
    # Recommendation.
    "bigmodel.nn.TwoTower": {"decay": "recency_decay"},
    "bigmodel.nn.two_tower.TwoTower": {"decay": "recency_decay"},
    "bigmodel.tasks.recommendation.Filters": {"keep": "keep_duplicates"},
    "bigmodel.tasks.recommendation.filters.Filters": {"keep": "keep_duplicates"},
    "bigmodel.tasks.recommendation.InteractionData": {"examples": "example_type", "step": "stride"},
    "bigmodel.tasks.recommendation.data.InteractionData": {"examples": "example_type", "step": "stride"},
    "bigmodel.tasks.recommendation.NonNeuralRecommendation": _NON_NEURAL,
    "bigmodel.tasks.recommendation.non_neural.NonNeuralRecommendation": _NON_NEURAL,
    "bigmodel.tasks.recommendation.PairRecommendation": _RECOMMENDATION,
    "bigmodel.tasks.recommendation.module.PairRecommendation": _RECOMMENDATION,
    "bigmodel.tasks.recommendation.SequentialRecommendation": _SEQUENTIAL,
    "bigmodel.tasks.recommendation.module.SequentialRecommendation": _SEQUENTIAL,
}
RENAMED_ARGUMENTS |= {
    # Transfer learning.
    "bigmodel.tasks.transfer_learning.TransferLearning": {"excuse": "ignore_mismatched"},
    "bigmodel.tasks.transfer_learning.module.TransferLearning": {"excuse": "ignore_mismatched"},
    "bigmodel.tasks.transfer_learning.LabelledTextData": {"problem": "problem_type"},
    "bigmodel.tasks.transfer_learning.data.LabelledTextData": {"problem": "problem_type"},
}
# Current class path: by argument, earlier values of it (short names such as those of a Literal) and current ones.
_ACTIONS = {"on_nonfinite": {"back": "rollback"}, "on_spike": {"back": "rollback"}}
_PROBLEM_TYPES = {
    "class": "single_label_classification",
    "labels": "multi_label_classification",
    "number": "regression",
}
RENAMED_VALUES: dict[str, dict[str, dict[str, str]]] = {
    "bigmodel.tasks.transfer_learning.LabelledTextData": {"problem_type": _PROBLEM_TYPES},
    "bigmodel.tasks.transfer_learning.data.LabelledTextData": {"problem_type": _PROBLEM_TYPES},
    "bigmodel.training.callbacks.Anomalies": _ACTIONS,
    "bigmodel.training.callbacks.anomalies.Anomalies": _ACTIONS,
}
# A mapping in the configuration: its keys by their earlier names.
RENAMED_KEYS = {"callbacks": {"times": "step_timer", "log": "training_log"}}
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
    for name, keys in RENAMED_KEYS.items():
        if isinstance(tree.get(name), dict):
            tree[name] = {keys.get(key, key): value for key, value in tree[name].items()}
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
    for mapping, names in RENAMED_KEYS.items():
        for name in names.keys() & (tree.get(mapping) or {}):
            return f"--{mapping}.{name} is now --{mapping}.{names[name]}"
    inner = ((key if name == "init_args" else f"{key}.{name}".lstrip("."), value) for name, value in tree.items())
    return next((found for place, value in inner if (found := find_renamed(value, place)) is not None), None)


def current_callbacks(states: dict[str, Any]) -> dict[str, Any]:
    """Return the states of callbacks in a checkpoint, keyed by the current names of their classes."""
    return {RENAMED_CALLBACKS.get(name, name): state for name, state in states.items()}
