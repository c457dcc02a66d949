"""Helpers for models of transformers: one kind of error, checked weights, sizes, heads, normalisation.

No code of the hub is run, and weights are read from safetensors only, unless configured otherwise. This module imports
transformers lazily.

B images, C channels, S pixels on a side, K classes.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from bigmodel.data.cache import say
from bigmodel.internals import cached_file

PREPROCESSOR = "preprocessor_config.json"
LEFT_OVER = "left over"  # label in `mismatches` for weights that the model does not have


@contextmanager
def readable(path: str, flag: str, kind: str, also: str = "", hub: str = "owner/name") -> Iterator[None]:
    """Convert exceptions of transformers for a missing or unreadable model to one kind of error.

    Args:
        path: a folder, or owner/name.
        flag: the flag that gave the path.
        kind: the expected kind of model.
        also: other values of the flag, appended to the message.
        hub: the flag's notation for a model of the hub.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise ValueError(
            f"{flag} {path} gives no {kind} ({reason}): it must be a folder with config.json and model.safetensors, or"
            f" {hub} of such a model on the Hugging Face hub, of an architecture that transformers itself knows" + also
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress transformers' loading report, which `mismatches` replaces, and its progress bar."""
    from transformers.utils import logging

    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()


def vision_settings(settings: Any) -> Any:
    """Return the part of a configuration for images, which is nested in models of images and text."""
    return getattr(settings, "vision_config", settings)


def set_image_size(settings: Any, image_size: int) -> None:
    """Set the pixels on a side in a configuration that has them."""
    vision = vision_settings(settings)
    if hasattr(vision, "image_size"):
        pair = isinstance(vision.image_size, list | tuple)
        vision.image_size = [image_size, image_size] if pair else image_size


def plain_settings(settings: Any) -> dict[str, Any]:
    """Return a configuration as plain values; `AutoConfig.for_model(**values)` recreates it."""
    values: dict[str, Any] = json.loads(settings.to_json_string(use_diff=False))
    return values


def find_head(model: nn.Module, **inputs: Tensor) -> str | None:
    """Return the name of the linear layer that computes a classifier's logits, found by a forward pass.

    Args:
        model: of transformers; left in evaluation mode.
        inputs: of the forward pass: images [B, C, S, S], or one text.

    Returns:
        The name; None if the model does not end in a linear layer. For a text model, the layer may compute logits at
        each token, and those at the last one are the text's.

    Raises:
        RuntimeError, ValueError, TypeError: by the model, if it cannot process such inputs.
    """
    outputs: list[tuple[str, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda _, args, output, name=name: outputs.append((name, output)))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad():
            logits = model.eval()(**inputs).logits
    finally:
        for hook in hooks:
            hook.remove()
    return next(
        (
            name
            for name, output in outputs
            if output is logits or (output.ndim == 3 and torch.equal(output[:, -1], logits))
        ),
        None,
    )


def mismatches(loaded: dict[str, Any], owner: str) -> dict[str, str]:
    """Return the problem of each weight, by name, from the report of `from_pretrained(..., output_loading_info=True)`.

    Args:
        loaded: the report.
        owner: the owner of the other shape, for messages.
    """
    problems = dict.fromkeys(loaded["missing_keys"], "missing")
    problems |= dict.fromkeys(loaded["unexpected_keys"], LEFT_OVER)
    for name, theirs, ours in loaded["mismatched_keys"]:
        problems[name] = f"shape {tuple(theirs)}, {owner} has {tuple(ours)}"
    return problems


def check_weights(
    problems: dict[str, str], errors: Iterable[str], ignore_mismatched: Iterable[str], path: str, remedy: str
) -> None:
    """Raise for weights that do not fit, unless they are ignored; print those that are.

    Args:
        problems: see `mismatches`, without those that are acceptable.
        errors: other messages of the report.
        ignore_mismatched: patterns (`*` as in file names) of names.
        path: the source of the weights.
        remedy: advice for the message.

    Raises:
        ValueError: with a list of them.
    """
    patterns = list(ignore_mismatched)
    ignored = sorted(name for name in problems if any(fnmatch.fnmatch(name, pattern) for pattern in patterns))
    refused = sorted(f"  {name}: {problem}" for name, problem in problems.items() if name not in ignored)
    refused += [f"  {message}" for message in errors]
    if refused:
        more = f"\n  and {len(refused) - 20} more" if len(refused) > 20 else ""
        raise ValueError(f"the weights of {path} do not fit:\n" + "\n".join(refused[:20]) + more + f"\n{remedy}")
    if ignored:
        rank_zero_only(say)(f"{path}: ignored weights, not loaded: {', '.join(ignored)}")


def normalization(path: str, in_channels: int) -> tuple[list[float], list[float]] | None:
    """Return mean and standard deviation by channel from preprocessor_config.json, for pixels in 0 to 1.

    None if it does not have them for this number of channels.
    """
    file = cached_file(path, PREPROCESSOR, required=False, online=False)
    if file is None:
        return None
    with open(file, encoding="utf-8") as stream:
        settings = json.load(stream)
    # Their pixels are 0 to 255 times this factor before the mean is subtracted.
    scale = 255 * settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 255
    mean, std = [0.0] * in_channels, [1.0] * in_channels
    if settings.get("do_normalize", True):
        mean, std = settings.get("image_mean"), settings.get("image_std")
    if mean is None or std is None or not len(mean) == len(std) == in_channels:
        return None
    return [value / scale for value in mean], [value / scale for value in std]
