"""Any image classifier of transformers as a net, with the weights it was published with or new ones.

B batch, C channels, S pixels on a side, D width of what the head reads, K classes.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from bigmodel.cache import say


class HuggingFace(nn.Module):
    """An image classifier of the Hugging Face hub, or of a folder that `save_pretrained` wrote: images [B, C, S, S] in,
    logits [B, K] out. No code of the hub is run, and weights are read from safetensors only.

    The configuration is taken over, with the number of classes, channels and pixels that the data have. A head for another
    number of classes is made anew, which is said; any other weight that is missing, left over or of another shape is
    refused, unless excused by name.

    What was built is described by the attribute `config`. Kept with the weights and given back as the argument of that
    name, it builds the same net where neither the hub nor the folder can be reached.

    Args:
        num_classes: number of classes K.
        in_channels: channels C of an image.
        image_size: pixels on a side, S.
        path: a folder, or `owner/name` on the hub.
        pretrained: take the weights; false: the architecture only, with new weights.
        config: the configuration of a net that was built before: nothing is read from `path`, and its weights are new ones,
            for the kept ones to be loaded into. Is not for people to set.
        excuse: patterns (`*` as in file names) of weights that may be missing, left over or of another shape; they start
            anew.

    Attributes:
        model: transformers' model.
        config: its configuration, plain values.
        normalization: mean and standard deviation by channel that the pictures had when the weights were trained, for pixels
            in 0 to 1; None if that is not known, for as many channels.

    Raises:
        ValueError: if there is no such model, its weights do not fit, or it cannot read such pictures.
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
        excuse: list[str] | None = None,
    ) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModelForImageClassification

        self.normalization: tuple[list[float], list[float]] | None = None
        loaded: dict[str, Any] | None = None
        if config is not None:
            settings = AutoConfig.for_model(**config)
            self.model: Any = AutoModelForImageClassification.from_config(settings, dtype=torch.float32)
        else:
            with _readable(path):
                settings = AutoConfig.from_pretrained(path, trust_remote_code=False)
            published = _sizes(settings)
            _set_sizes(settings, num_classes, in_channels, image_size)
            if pretrained:
                with _readable(path), _quiet():
                    self.model, loaded = AutoModelForImageClassification.from_pretrained(
                        path,
                        config=settings,
                        dtype=torch.float32,
                        use_safetensors=True,
                        trust_remote_code=False,
                        ignore_mismatched_sizes=True,
                        output_loading_info=True,
                    )
                    self.normalization = _normalization(path, in_channels)
            else:
                with _readable(path):
                    self.model = AutoModelForImageClassification.from_config(settings, dtype=torch.float32)
        self.config: dict[str, Any] = json.loads(settings.to_json_string(use_diff=False))
        self._head_name = _find_head(self.model, path, (1, in_channels, image_size, image_size))
        if loaded is not None:
            _check_loaded(loaded, path, published, num_classes, self._head_name, excuse or [])
        self.model.train()  # transformers hands it over in evaluation mode, and Lightning leaves it there

    def features(self, images: Tensor) -> Tensor:
        """[B, C, S, S] -> [B, D], what the head reads; the logits themselves, if the model ends in no linear layer."""
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
        """[..., D] -> [..., K]."""
        return features if self._head_name is None else self.model.get_submodule(self._head_name)(features)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, S, S]."""
        logits: Tensor = self.model(pixel_values=images).logits
        return logits


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """Turn what transformers raises where it finds no model that it can read into one kind of error."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise ValueError(
            f"--model.net.path {path} gives no image classifier ({reason}): it must be a folder with config.json and"
            " model.safetensors, or owner/name of such a model on the Hugging Face hub, of an architecture that transformers"
            " itself knows"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report of what it loaded: `_check_loaded` reads it."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _vision(settings: Any) -> Any:
    """The part of a configuration that says how pictures are read: models of pictures and text have it inside."""
    return getattr(settings, "vision_config", settings)


def _sizes(settings: Any) -> dict[str, Any]:
    """What a published model was made for; None where its configuration does not say."""
    vision = _vision(settings)
    return {
        "num_labels": settings.num_labels,
        "size": getattr(vision, "image_size", None),
        "channels": getattr(vision, "num_channels", None),
    }


def _set_sizes(settings: Any, num_classes: int, in_channels: int, image_size: int) -> None:
    if settings.num_labels != num_classes:  # else their names stay
        settings.num_labels = num_classes
    vision = _vision(settings)
    if hasattr(vision, "num_channels"):
        vision.num_channels = in_channels
    if hasattr(vision, "image_size"):
        pair = isinstance(vision.image_size, list | tuple)
        vision.image_size = [image_size, image_size] if pair else image_size


def _find_head(model: nn.Module, path: str, shape: tuple[int, ...]) -> str | None:
    """The name of the linear layer whose output is what the model returns, found by asking for one picture's logits."""
    outputs: list[tuple[str, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda _, args, output, name=name: outputs.append((name, output)))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    weight = next(model.parameters())
    try:
        with torch.no_grad():
            logits = model.eval()(pixel_values=weight.new_zeros(shape)).logits
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"the model of --model.net.path {path} cannot read pictures of {shape[1]} channel(s) and {shape[-1]} pixels on a"
            f" side ({str(error).strip().splitlines()[0][:200]}); set --data.channels and --data.size to what it reads"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return next((name for name, output in outputs if output is logits), None)


def _check_loaded(
    loaded: dict[str, Any], path: str, published: dict[str, Any], num_classes: int, head: str | None, excuse: list[str]
) -> None:
    """Refuse weights that are not the model's; say what was made anew."""
    problems = dict.fromkeys(loaded["missing_keys"], "missing")
    problems |= dict.fromkeys(loaded["unexpected_keys"], "left over")
    new_head = {name for name in problems if head is not None and name.startswith(f"{head}.")}
    for name, theirs, ours in loaded["mismatched_keys"]:
        problems[name] = f"shape {tuple(theirs)}, the model for these pictures has {tuple(ours)}"
        if (theirs[0], ours[0]) == (published["num_labels"], num_classes) and theirs[1:] == ours[1:]:
            new_head.add(name)
    excused = {name for name in problems if any(fnmatch.fnmatch(name, pattern) for pattern in excuse)}
    refused = sorted(f"  {name}: {problem}" for name, problem in problems.items() if name not in new_head | excused)
    refused += [f"  {message}" for message in loaded["error_msgs"]]
    if refused:
        more = f"\n  and {len(refused) - 20} more" if len(refused) > 20 else ""
        trained = [f"--data.{flag} {published[flag]}" for flag in ("size", "channels") if published[flag]]
        raise ValueError(
            f"the weights of {path} do not fit:\n"
            + "\n".join(refused[:20])
            + more
            + "\nset the sizes that they were trained with"
            + (f" ({', '.join(trained)})" if trained else "")
            + ", or start what may start anew by naming it in --model.net.excuse"
        )
    if new_head:
        rank_zero_only(say)(f"{path}: a new head for {num_classes} classes in place of its own")
    if excused:
        rank_zero_only(say)(f"{path}: as excused, not taken: {', '.join(sorted(excused))}")


def _normalization(path: str, in_channels: int) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation that preprocessor_config.json gives, for pixels in 0 to 1."""
    from transformers.utils import cached_file

    file = cached_file(
        path,
        "preprocessor_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        return None
    with open(file, encoding="utf-8") as stream:
        settings = json.load(stream)
    # Their pixels are 0 to 255 times this factor before the mean is taken off.
    scale = 255 * settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 255
    mean, std = [0.0] * in_channels, [1.0] * in_channels
    if settings.get("do_normalize", True):
        mean, std = settings.get("image_mean"), settings.get("image_std")
    if mean is None or std is None or not len(mean) == len(std) == in_channels:
        return None
    return [value / scale for value in mean], [value / scale for value in std]
