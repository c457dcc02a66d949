"""Methods of transfer learning, and their names."""

from __future__ import annotations

from bigmodel.tasks.transfer_learning.methods.base import BiasOnly, Full, Method
from bigmodel.tasks.transfer_learning.methods.gradual import Gradual
from bigmodel.tasks.transfer_learning.methods.knn_probe import KNNProbe
from bigmodel.tasks.transfer_learning.methods.linear_probe import LinearProbe
from bigmodel.tasks.transfer_learning.methods.lora import LoRA

__all__ = ["BiasOnly", "Full", "Gradual", "KNNProbe", "LinearProbe", "LoRA", "Method", "find_method"]

WORDS: dict[str, type[Method]] = {
    "full": Full,
    "linear_probe": LinearProbe,
    "knn_probe": KNNProbe,
    "gradual": Gradual,
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
    if given not in WORDS:
        raise ValueError(f"--model.method {given}: choose {', '.join(WORDS)}, or give the class_path of a Method")
    return WORDS[given]()
