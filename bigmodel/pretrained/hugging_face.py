"""What it takes to use models of transformers: one kind of error, weights that are checked, sizes, heads, normalisation.

No code of the hub is run, and weights are read from safetensors only, unless told. This module imports transformers when it
is used.

B pictures, C channels, S pixels on a side, K classes.
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

PREPROCESSOR = "preprocessor_config.json"
LEFT_OVER = "left over"  # what `mismatches` calls weights that the model does not have


@contextmanager
def readable(path: str, flag: str, kind: str, also: str = "", hub: str = "owner/name") -> Iterator[None]:
    """Turn what transformers raises where it finds no model that it can read into one kind of error.

    Args:
        path: a folder, or owner/name.
        flag: that it was given by.
        kind: of model that is looked for.
        also: what else the flag takes, to end the message with.
        hub: how the flag spells a model of the hub.
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
    """Without transformers' report of what it loaded, which `mismatches` reads, and without its bar of seconds."""
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
    """The part of a configuration that says how pictures are read: models of pictures and text have it inside."""
    return getattr(settings, "vision_config", settings)


def set_image_size(settings: Any, image_size: int) -> None:
    """Write the pixels on a side into a configuration that names them."""
    vision = vision_settings(settings)
    if hasattr(vision, "image_size"):
        pair = isinstance(vision.image_size, list | tuple)
        vision.image_size = [image_size, image_size] if pair else image_size


def plain_settings(settings: Any) -> dict[str, Any]:
    """A configuration as plain values; `AutoConfig.for_model(**values)` makes it again."""
    values: dict[str, Any] = json.loads(settings.to_json_string(use_diff=False))
    return values


def find_head(model: nn.Module, **inputs: Tensor) -> str | None:
    """The name of the linear layer whose output is what a classifier returns, found by asking for logits.

    Args:
        model: of transformers; left in evaluation mode.
        inputs: what it is asked of: pictures [B, C, S, S], or one text.

    Returns:
        The name; None if the model ends in no linear layer. Of one that reads text, the layer may give logits at each token,
        those at the last one being the text's.

    Raises:
        RuntimeError, ValueError, TypeError: by the model, if it cannot read such inputs.
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
    """What is wrong with each weight, by name, as `from_pretrained(..., output_loading_info=True)` reports it.

    Args:
        loaded: the report.
        owner: who has the other shape, as the messages name it.
    """
    problems = dict.fromkeys(loaded["missing_keys"], "missing")
    problems |= dict.fromkeys(loaded["unexpected_keys"], LEFT_OVER)
    for name, theirs, ours in loaded["mismatched_keys"]:
        problems[name] = f"shape {tuple(theirs)}, {owner} has {tuple(ours)}"
    return problems


def check_weights(
    problems: dict[str, str], errors: Iterable[str], excuse: Iterable[str], path: str, remedy: str
) -> None:
    """Refuse weights that do not fit, unless excused; say which were.

    Args:
        problems: see `mismatches`, without those that are none.
        errors: other messages of the report.
        excuse: patterns (`*` as in file names) of names.
        path: where the weights are from.
        remedy: what a person can do.

    Raises:
        ValueError: that lists them.
    """
    patterns = list(excuse)
    excused = sorted(name for name in problems if any(fnmatch.fnmatch(name, pattern) for pattern in patterns))
    refused = sorted(f"  {name}: {problem}" for name, problem in problems.items() if name not in excused)
    refused += [f"  {message}" for message in errors]
    if refused:
        more = f"\n  and {len(refused) - 20} more" if len(refused) > 20 else ""
        raise ValueError(f"the weights of {path} do not fit:\n" + "\n".join(refused[:20]) + more + f"\n{remedy}")
    if excused:
        rank_zero_only(say)(f"{path}: as excused, not taken: {', '.join(excused)}")


def normalization(path: str, in_channels: int) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation by channel that preprocessor_config.json gives, for pixels in 0 to 1; None if it does not,
    for as many channels."""
    from transformers.utils import cached_file

    file = cached_file(
        path,
        PREPROCESSOR,
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
