"""Wraps any transformers image classifier as a net, with its published weights or new ones.

B batch, C channels, S pixels on a side, D width of the input of the output layer, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from bigmodel.data.cache import say
from bigmodel.pretrained import hugging_face, published

_PATH = "--model.net.path"
_KIND = "image classifier"


class Classifier(nn.Module):
    """A transformers image classifier, split before its head: maps images [B, C, S, S] to logits [B, K].

    Args:
        model: transformers' model.
        head: the name of the linear layer that computes the logits; None if the last layer is not linear.
        normalization: see `HuggingFace`.
    """

    def __init__(self, model: Any, head: str | None, normalization: tuple[list[float], list[float]] | None) -> None:
        super().__init__()
        self.model, self._head_name, self.normalization = model, head, normalization

    def features(self, images: Tensor) -> Tensor:
        """Map images [B, C, S, S] to the input of the output layer [B, D]; the logits if the last layer is not linear."""
        if self._head_name is None:
            return self(images)
        read: list[Tensor] = []
        hook = self.model.get_submodule(self._head_name).register_forward_pre_hook(lambda _, args: read.append(args[0]))
        try:
            self(images)
        finally:
            hook.remove()
        return read[0]

    def logits(self, features: Tensor) -> Tensor:
        """Map features [..., D] to logits [..., K]."""
        return features if self._head_name is None else self.model.get_submodule(self._head_name)(features)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K] of images [B, C, S, S]."""
        logits: Tensor = self.model(pixel_values=images).logits
        return logits


class HuggingFace(Classifier):
    """An image classifier of the Hugging Face hub, or of a folder that `save_pretrained` wrote: maps images [B, C, S,
    S] to logits [B, K]. No code of the hub is run, and weights are read from safetensors only.

    The configuration is used with the data's number of classes, channels and pixels. A head for a different
    number of classes is newly initialised, which is printed; any other weight that is missing, unexpected or of a different
    shape is an error, unless named in `ignore_mismatched`.

    The attribute `config` describes the net. If it is saved with the weights and passed as the argument of that
    name, it builds the same net where neither the hub nor the folder can be reached.

    Args:
        num_classes: number of classes K.
        in_channels: channels C of an image.
        image_size: pixels on a side, S.
        path: a folder, or `owner/name` on the hub.
        pretrained: use the pretrained weights; false: the architecture only, with new weights.
        config: the configuration of a net that was built before: nothing is read from `path`, and its weights are new ones,
            into which the saved ones are loaded. Not to be set by users.
        ignore_mismatched: patterns (`*` as in file names) of weights that may be missing, unexpected or of a different
            shape; they are newly initialised.

    Attributes:
        model: transformers' model.
        config: its configuration, plain values.
        normalization: mean and standard deviation by channel that the images had when the weights were trained, for
            pixels in 0 to 1; None if not stated for this number of channels.

    Raises:
        ValueError: if the model does not exist, its weights do not match, or it cannot read such images.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        image_size: int,
        *,
        path: str,
        pretrained: bool = True,
        config: dict[str, Any] | None = None,
        ignore_mismatched: list[str] | None = None,
    ) -> None:
        from transformers import AutoConfig, AutoModelForImageClassification

        statistics: tuple[list[float], list[float]] | None = None
        loaded: dict[str, Any] | None = None
        if config is not None:
            settings = AutoConfig.for_model(**config)
            model: Any = AutoModelForImageClassification.from_config(settings, dtype=torch.float32)
        else:
            with _readable(path):
                settings = AutoConfig.from_pretrained(path, trust_remote_code=False)
            trained = _sizes(settings)
            _set_sizes(settings, num_classes, in_channels, image_size)
            if pretrained:
                with _readable(path), hugging_face.quiet():
                    model, loaded = AutoModelForImageClassification.from_pretrained(
                        path,
                        config=settings,
                        dtype=torch.float32,
                        use_safetensors=True,
                        trust_remote_code=False,
                        ignore_mismatched_sizes=True,
                        output_loading_info=True,
                    )
                    statistics = hugging_face.normalization(path, in_channels)
            else:
                with _readable(path):
                    model = AutoModelForImageClassification.from_config(settings, dtype=torch.float32)
        head = _find_head(model, (1, in_channels, image_size, image_size), f"{_PATH} {path}")
        super().__init__(model, head, statistics)
        self.config: dict[str, Any] = hugging_face.plain_settings(settings)
        if loaded is not None:
            _check_loaded(loaded, path, trained, num_classes, head, ignore_mismatched or [])
        self.model.train()  # transformers returns it in evaluation mode, which Lightning does not change


def as_published(
    path: str, flag: str, *, classes: Sequence[str], in_channels: int, image_size: int
) -> tuple[Classifier, int]:
    """Load a classifier with all of its weights and its own number of channels.

    Args:
        path: a folder, or hf://owner/name.
        flag: the flag that the path was given by, for messages.
        classes: the class names of the data; the logits are returned in their order.
        in_channels: of the data.
        image_size: pixels on a side, S.

    Returns:
        The net, and its channels C: those of the data, or 3 for grey and 1 for coloured images.

    Raises:
        ValueError: if the model does not exist or has different classes, a weight is missing or has a different shape,
            or it cannot read such images.
    """
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoModelForImageClassification

    settings = published.read_settings(path, flag, _KIND, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING)
    order = published.class_order(settings, classes, path, flag)
    trained = _sizes(settings)
    channels = trained["channels"] if trained["channels"] in (1, 3) else in_channels
    hugging_face.set_image_size(settings, image_size)
    remedy = (
        f"set --data.size {trained['size']}, which it was trained with"
        if trained["size"]
        else "choose a different model"
    )
    model = published.load(AutoModelForImageClassification, path, flag, _KIND, settings, remedy)
    head = _find_head(model, (1, channels, image_size, image_size), f"{flag} {path}")
    if order != sorted(order):
        if head is None:
            raise ValueError(
                f"{flag} {path} has the data's classes in a different order, and cannot be reordered, because its last layer"
                " is not linear: choose a different model"
            )
        published.reorder(model.get_submodule(head), order)
    statistics = hugging_face.normalization(published.location(path), channels)
    if statistics is None:
        rank_zero_only(say)(
            f"{path}: {hugging_face.PREPROCESSOR} has no mean and standard deviation; pixels are read as 0 to 1"
        )
    return Classifier(model, head, statistics), channels


def _readable(path: str) -> AbstractContextManager[None]:
    return hugging_face.readable(path, _PATH, _KIND)


def _sizes(settings: Any) -> dict[str, Any]:
    """Return the sizes that a published model was made for; None where its configuration lacks one."""
    vision = hugging_face.vision_settings(settings)
    return {
        "num_labels": settings.num_labels,
        "size": getattr(vision, "image_size", None),
        "channels": getattr(vision, "num_channels", None),
    }


def _set_sizes(settings: Any, num_classes: int, in_channels: int, image_size: int) -> None:
    if settings.num_labels != num_classes:  # else their names stay
        settings.num_labels = num_classes
    vision = hugging_face.vision_settings(settings)
    if hasattr(vision, "num_channels"):
        vision.num_channels = in_channels
    hugging_face.set_image_size(settings, image_size)


def _find_head(model: nn.Module, shape: tuple[int, ...], where: str) -> str | None:
    try:
        return hugging_face.find_head(model, pixel_values=next(model.parameters()).new_zeros(shape))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"the model of {where} cannot read images of {shape[1]} channel(s) and {shape[-1]} pixels on a"
            f" side ({str(error).strip().splitlines()[0][:200]}); set --data.channels and --data.size to the model's"
        ) from error


def _check_loaded(
    loaded: dict[str, Any],
    path: str,
    sizes: dict[str, Any],
    num_classes: int,
    head: str | None,
    ignore_mismatched: list[str],
) -> None:
    """Raise an error for weights that do not match the model; print which were newly initialised."""
    problems = hugging_face.mismatches(loaded, "the model for these images")
    new_head = {name for name in problems if head is not None and name.startswith(f"{head}.")}
    for name, saved, built in loaded["mismatched_keys"]:
        if (saved[0], built[0]) == (sizes["num_labels"], num_classes) and saved[1:] == built[1:]:
            new_head.add(name)
    trained = [f"--data.{flag} {sizes[flag]}" for flag in ("size", "channels") if sizes[flag]]
    hugging_face.check_weights(
        {name: problem for name, problem in problems.items() if name not in new_head},
        loaded["error_msgs"],
        ignore_mismatched,
        path,
        "set the sizes that they were trained with"
        + (f" ({', '.join(trained)})" if trained else "")
        + ", or name weights to initialise newly in --model.net.ignore_mismatched",
    )
    if new_head:
        rank_zero_only(say)(f"{path}: the head is newly initialised for {num_classes} classes")
