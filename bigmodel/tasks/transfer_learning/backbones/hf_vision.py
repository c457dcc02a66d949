"""Any vision model of transformers as a backbone: maps images to the input of its output layer.

B images, C channels, S pixels on a side, T tokens, D width, H and W positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from bigmodel.data.cache import say
from bigmodel.nn import guard_convolutions
from bigmodel.pretrained import hugging_face
from bigmodel.tasks.transfer_learning.backbones.base import Backbone, probe_of
from bigmodel.tasks.transfer_learning.backbones.files import FLAG, from_weights

_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow
_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")


class HuggingFaceImages(Backbone):
    """A model of transformers that reads images, without its head; it pools them itself.

    For a classifier: the input of its output layer (the logits if its last layer is not linear). For any other model:
    its `pooler_output`; without one, the class token of the last layer, the mean over tokens that have none, or over
    positions.

    Args:
        model: a transformers model; the head of a classifier is removed.
        normalization: mean and standard deviation by channel, for pixels in 0 to 1.
        data_sizes: `in_channels` C and `image_size` S of the data.

    Raises:
        ValueError: if the model cannot read such images.
    """

    modality = "images"
    pooling = None
    text_encoder = None

    def __init__(
        self, model: Any, normalization: tuple[list[float], list[float]], data_sizes: Mapping[str, int]
    ) -> None:
        super().__init__()
        settings = hugging_face.plain_settings(model.config)
        sizes = {name: data_sizes[name] for name in ("in_channels", "image_size")}
        guard_convolutions(model)  # images are in channels_last
        self.model = model
        self.is_classifier = "ForImageClassification" in type(model).__name__
        for name, values in zip(("mean", "std"), normalization, strict=True):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32)[:, None, None], persistent=False)
        self.mean: Tensor
        self.std: Tensor
        try:
            if self.is_classifier:
                shape = (1, len(self.mean), sizes["image_size"], sizes["image_size"])
                head = hugging_face.find_head(model, pixel_values=next(model.parameters()).new_zeros(shape))
                if head is not None:
                    model.set_submodule(head, nn.Identity())
            self._find_parts(model, probe_of("images", sizes, model.device))
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(
                f"{FLAG}: this {type(model).__name__} does not accept images of {sizes['in_channels']} channel(s) and"
                f" {sizes['image_size']} pixels on a side ({str(error).strip().splitlines()[0][:200]}): set --data.channels"
                " and --data.size to those of the model"
            ) from error
        self.description = {
            "kind": "hugging_face_images",
            "settings": settings,
            "is_classifier": self.is_classifier,
            "has_pooler": getattr(model, "pooler", None) is not None,
            "normalization": [list(values) for values in normalization],
            "sizes": sizes,
        }
        self.train()

    def forward(self, batch: Any) -> tuple[Tensor, None]:
        """Return [B, D] and None, for a batch whose images [B, C, S, S] are in 0 to 255 (uint8) or 0 to 1 (float)."""
        outputs = self.model(pixel_values=self._normalize(batch.images))
        if self.is_classifier:
            return outputs.logits.flatten(1), None  # an identity replaces the head
        pooled = getattr(outputs, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1), None  # [B, D, 1, 1] of convolutional nets
        last = outputs.last_hidden_state
        if last.ndim == 4:
            return last.mean((2, 3)), None  # [B, D, H, W] -> [B, D]
        return (last[:, 0] if self._has_class_token else last.mean(1)), None  # [B, T, D] -> [B, D]

    @property
    def _has_class_token(self) -> bool:
        return any(name.rpartition(".")[2] in _CLASS_TOKENS for name, _ in self.model.named_parameters())

    def _normalize(self, images: Tensor) -> Tensor:
        """Return float32 images, normalized for the model; the number of channels is converted (grayscale to 3, RGB to
        1).
        """
        images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        if images.shape[1] == 3 and len(self.mean) == 1:
            images = (images * images.new_tensor(_LUMINANCE)[:, None, None]).sum(1, keepdim=True)
        return (images - self.mean) / self.std


def from_files(
    path: str,
    settings: Any,
    *,
    pretrained: bool,
    ignore_mismatched: Iterable[str],
    allow_pickle: bool,
    data_sizes: Mapping[str, int] | None,
) -> HuggingFaceImages:
    """Load the backbone from a folder or the hub; see `build_backbone`."""
    from transformers import AutoModel, AutoModelForImageClassification

    vision = hugging_face.vision_settings(settings)
    trained_size = getattr(vision, "image_size", None)
    trained_size = trained_size[0] if isinstance(trained_size, list | tuple) else trained_size
    channels = getattr(vision, "num_channels", 3)
    sizes = data_sizes or {"in_channels": channels, "image_size": trained_size or 224}
    hugging_face.set_image_size(settings, sizes["image_size"])
    is_classifier = any("ForImageClassification" in name for name in settings.architectures or [])
    kind = AutoModelForImageClassification if is_classifier else AutoModel
    found = hugging_face.normalization(path, channels)
    if found is None:
        rank_zero_only(say)(
            f"{path}: no mean and standard deviation in preprocessor_config.json; pixels are scaled to 0 to 1"
        )
    normalization = found or ([0.0] * channels, [1.0] * channels)
    if not pretrained:
        model = kind.from_config(settings, dtype=torch.float32)
        return HuggingFaceImages(model, normalization, sizes)
    model, loaded = from_weights(kind, path, settings, allow_pickle)
    problems = hugging_face.mismatches(loaded, "the model for these images")
    untrained = {name for name, problem in problems.items() if name.startswith("pooler.") and problem == "missing"}
    if untrained:
        model.pooler = None
        rank_zero_only(say)(f"{path}: its weights have no pooler; features are those of the last layer")
    hugging_face.check_weights(
        {name: problem for name, problem in problems.items() if name not in untrained},
        loaded["error_msgs"],
        ignore_mismatched,
        path,
        "set the size that they were trained with"
        + (f" (--data.size {trained_size})" if trained_size else "")
        + "; to initialise them newly, name them in --model.ignore_mismatched",
    )
    return HuggingFaceImages(model, normalization, sizes)


def from_description(description: dict[str, Any]) -> HuggingFaceImages:
    """Return the same architecture, with new weights."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

    settings = AutoConfig.for_model(**description["settings"])
    kind = AutoModelForImageClassification if description["is_classifier"] else AutoModel
    model = kind.from_config(settings, dtype=torch.float32)
    if not description["has_pooler"] and hasattr(model, "pooler"):
        model.pooler = None
    mean, std = description["normalization"]
    return HuggingFaceImages(model, (mean, std), description["sizes"])
