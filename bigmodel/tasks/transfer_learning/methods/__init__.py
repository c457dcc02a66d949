"""Fine-tuning methods, and their short names."""

from __future__ import annotations

from bigmodel.tasks.transfer_learning.methods.base import BiasOnly, FullFineTuning, Method
from bigmodel.tasks.transfer_learning.methods.gradual import GradualUnfreezing
from bigmodel.tasks.transfer_learning.methods.knn_probe import KNNProbe
from bigmodel.tasks.transfer_learning.methods.linear_probe import LinearProbe
from bigmodel.tasks.transfer_learning.methods.lora import LoRA

__all__ = [
    "METHODS",
    "BiasOnly",
    "FullFineTuning",
    "GradualUnfreezing",
    "KNNProbe",
    "LinearProbe",
    "LoRA",
    "Method",
    "find_method",
]

METHODS: dict[str, type[Method]] = {
    "full": FullFineTuning,
    "linear_probe": LinearProbe,
    "knn_probe": KNNProbe,
    "gradual": GradualUnfreezing,
    "lora": LoRA,
    "bias_only": BiasOnly,
}


def find_method(given: str | Method) -> Method:
    """Return the method of this name with its defaults; or the method itself.

    Raises:
        ValueError: unknown name.
    """
    if isinstance(given, Method):
        return given
    if given not in METHODS:
        raise ValueError(f"--model.method {given}: accepted are {', '.join(METHODS)}, or the class_path of a Method")
    return METHODS[given]()
