"""Published models in Hugging Face's format, used unchanged: files, weights, classes, tokens.

Nothing is reinitialized and no code of the hub is run; weights are read from safetensors only. A path is a folder
(config.json, model.safetensors) or hf://owner/name. This module imports transformers lazily.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import nn

from bigmodel.data.cache import first_of, say
from bigmodel.internals import cached_file
from bigmodel.pretrained import hugging_face

HUB = "hf://"
CONFIG = "config.json"
_SHOWN = 5  # names of classes in a message


def location(path: str) -> str:
    """Return transformers' name of it: the folder, or owner/name."""
    return path.removeprefix(HUB).strip("/") if path.startswith(HUB) else str(Path(path).expanduser())


def _readable(path: str, flag: str, kind: str) -> AbstractContextManager[None]:
    return hugging_face.readable(path, flag, kind, hub=f"{HUB}owner/name")


def identity(path: str, flag: str) -> str:
    """Return 64 hexadecimal digits that identify a model's outputs.

    They depend on its configuration, its weights, and its image preprocessing. Files are hashed and not loaded.

    Args:
        path: of the model.
        flag: the flag that gave the path, for messages.

    Raises:
        ValueError: if there is no model with safetensors.
    """
    found = hashlib.sha256()
    for file in _files(path, flag):
        with open(file, "rb") as stream:
            found.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()


def _files(path: str, flag: str) -> list[Path]:
    """Return the files of a model, local or downloaded from the hub."""

    def find(name: str, needed: bool = True) -> str | None:
        return cached_file(location(path), name, required=needed)

    single, several = "model.safetensors", "model.safetensors.index.json"
    with _readable(path, flag, "model"):
        names = [single]
        if find(single, needed=False) is None and (index := find(several, needed=False)) is not None:
            names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
        files = [find(CONFIG), *map(find, names), find(hugging_face.PREPROCESSOR, needed=False)]
    return [Path(file) for file in files if file is not None]


def read_settings(path: str, flag: str, kind: str, mapping: Any) -> Any:
    """Return a model's configuration.

    Args:
        path: of the model.
        flag: the flag that gave the path, for messages.
        kind: the expected kind of model.
        mapping: transformers' classes of such models, one of its MODEL_FOR_..._MAPPING.

    Raises:
        ValueError: if there is none, its architecture is unknown to transformers, or it is of another kind.
    """
    from transformers import AutoConfig

    with _readable(path, flag, kind):
        settings = AutoConfig.from_pretrained(location(path), trust_remote_code=False)
    known = mapping.get(type(settings), ())
    names = [model.__name__ for model in (known if isinstance(known, list | tuple) else [known])]
    written = settings.architectures or names
    if not set(written) & set(names):
        what = written[0] if written else settings.model_type
        raise ValueError(f"{flag} {path} ({what}) is no {kind}: name a model that was trained as one")
    return settings


def load(auto: Any, path: str, flag: str, kind: str, settings: Any, remedy: str) -> Any:
    """Return the model with all of its weights, in float32 and evaluation mode, without trainable parameters.

    Args:
        auto: one of transformers' classes AutoModelFor...
        path: of the model.
        flag: the flag that gave the path, for messages.
        kind: the expected kind of model.
        settings: its configuration, see `read_settings`; image sizes may have been changed.
        remedy: advice for the message if a weight is missing or has another shape.

    Raises:
        ValueError: if a weight is missing, has another shape, or cannot be read. Unused weights are printed in a line.
    """
    with _readable(path, flag, kind), hugging_face.quiet():
        model, loaded = auto.from_pretrained(
            location(path),
            config=settings,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    problems = hugging_face.mismatches(loaded, "the model")
    unread = sorted(name for name, problem in problems.items() if problem == hugging_face.LEFT_OVER)
    hugging_face.check_weights(
        {name: problem for name, problem in problems.items() if name not in unread},
        loaded["error_msgs"],
        (),
        f"{flag} {path}",
        remedy,
    )
    if unread:
        rank_zero_only(say)(
            f"{path}: weights that a {type(model).__name__} does not have are left: {', '.join(unread)}"
        )
    return model.requires_grad_(False).eval()


def class_order(settings: Any, classes: Sequence[str], path: str, flag: str) -> list[int]:
    """Return the output number of each class in a classifier, by the names in its id2label, ignoring case.

    If either side has numbers instead of names (LABEL_0 or 0, and so on), class i is output i, and a line is printed.

    Args:
        settings: its configuration.
        classes: the data's class names, in order.
        path, flag: see `identity`.

    Raises:
        ValueError: if its classes differ, or their number.
    """
    names = [str(settings.id2label.get(i, i)) for i in range(settings.num_labels)]
    theirs, ours = ([" ".join(name.casefold().split()) for name in some] for some in (names, classes))
    has, expected = first_of(names, _SHOWN), first_of(classes, _SHOWN)
    if len(theirs) != len(ours):
        raise ValueError(
            f"{flag} {path} has {len(names):,} classes ({has}), and the data {len(classes):,} ({expected}):"
            " set a model with the classes of the data"
        )
    if len(set(ours)) == len(ours) and sorted(theirs) == sorted(ours):
        return [theirs.index(name) for name in ours]
    if theirs != ours and not _are_numbers(theirs) and not _are_numbers(ours):
        raise ValueError(
            f"{flag} {path} has the classes {has}, and the data {expected}: set a model with the classes of the"
            f" data. If they are the same, rename them in id2label of its {CONFIG}"
        )
    if theirs != ours:
        rank_zero_only(say)(f"{path}: its classes ({has}) are matched by number to those of the data ({expected})")
    return list(range(len(ours)))


def _are_numbers(names: Sequence[str]) -> bool:
    return all(re.fullmatch(rf"(label_)?{i}", name) for i, name in enumerate(names))


def reorder(head: nn.Linear, order: Sequence[int]) -> None:
    """Reorder a head's outputs: output i becomes the former `order[i]`."""
    head.weight.data = head.weight.data[list(order)]
    if head.bias is not None:
        head.bias.data = head.bias.data[list(order)]


def tokenizer_difference(theirs: Any, ours: Any) -> str | None:
    """Describe how two tokenizers of the library `tokenizers` encode text differently; None if they do not.

    Special tokens around a text, truncation, padding and decoding are ignored.
    """
    a, b = (tokenizer.get_vocab(with_added_tokens=True) for tokenizer in (theirs, ours))
    if len(a) != len(b):
        return f"{len(a):,} tokens, and the data's {len(b):,}"
    if a != b:
        token = min(a.items() ^ b.items(), key=lambda item: item[1])[1]
        return f"token {token:,} is {theirs.id_to_token(token)!r}, and the data's {ours.id_to_token(token)!r}"
    plain = [json.loads(tokenizer.to_str()) for tokenizer in (theirs, ours)]
    for part in ("normalizer", "pre_tokenizer", "added_tokens", "model"):
        if plain[0][part] != plain[1][part]:
            return f"the same tokens, and text is cut into them in another way (its {part} differs)"
    return None
