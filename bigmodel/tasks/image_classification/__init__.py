"""Image classification: train a model that predicts the class of an image."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigmodel.tasks.image_classification.augment import Transform
    from bigmodel.tasks.image_classification.auto_augment import RandAugment, TrivialAugmentWide
    from bigmodel.tasks.image_classification.batch import ImageBatch
    from bigmodel.tasks.image_classification.color import ColorJitter, RandomGrayscale
    from bigmodel.tasks.image_classification.data import ImageData
    from bigmodel.tasks.image_classification.geometry import RandomAffine, RandomCrop, RandomFlip, RandomResizedCrop
    from bigmodel.tasks.image_classification.hugging_face import HuggingFace
    from bigmodel.tasks.image_classification.mixup import MixupCutMix
    from bigmodel.tasks.image_classification.module import ImageClassification
    from bigmodel.tasks.image_classification.random_erasing import RandomErasing
    from bigmodel.tasks.image_classification.sources import ImageColumns
    from bigmodel.tasks.image_classification.splits import ImageSplit

__all__ = [
    "ColorJitter",
    "HuggingFace",
    "ImageBatch",
    "ImageClassification",
    "ImageColumns",
    "ImageData",
    "ImageSplit",
    "MixupCutMix",
    "RandAugment",
    "RandomAffine",
    "RandomCrop",
    "RandomErasing",
    "RandomFlip",
    "RandomGrayscale",
    "RandomResizedCrop",
    "Transform",
    "TrivialAugmentWide",
]
_WHERE = {
    "augment": ("Transform",),
    "color": ("ColorJitter", "RandomGrayscale"),
    "data": ("ImageData",),
    "random_erasing": ("RandomErasing",),
    "geometry": ("RandomFlip", "RandomAffine", "RandomCrop", "RandomResizedCrop"),
    "hugging_face": ("HuggingFace",),
    "mixup": ("MixupCutMix",),
    "module": ("ImageClassification",),
    "batch": ("ImageBatch",),
    "auto_augment": ("RandAugment", "TrivialAugmentWide"),
    "sources": ("ImageColumns",),
    "splits": ("ImageSplit",),
}


def __getattr__(name: str) -> Any:
    """Import on first access: the processes that decode need neither torch nor Lightning."""
    for module, names in _WHERE.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
