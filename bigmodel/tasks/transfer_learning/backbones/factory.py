"""Builds a backbone from a path, and rebuilds it from the description in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bigmodel import run
from bigmodel.tasks.transfer_learning.backbones import files, from_run, hf_text, hf_vision
from bigmodel.tasks.transfer_learning.backbones.base import Backbone
from bigmodel.tasks.transfer_learning.backbones.bundled import folder_of
from bigmodel.tasks.transfer_learning.tokenization import TextEncoder

_KINDS: dict[str, Callable[[dict[str, Any]], Backbone]] = {
    "hugging_face_text": hf_text.from_description,
    "hugging_face_images": hf_vision.from_description,
    "own_run": from_run.from_description,
}


def build_backbone(
    path: str,
    *,
    pretrained: bool = True,
    ignore_mismatched: Iterable[str] = (),
    allow_pickle: bool = False,
    data_sizes: Mapping[str, int] | None = None,
    layers: Sequence[int] | None = None,
) -> Backbone:
    """Return a pretrained net without its head, in training mode.

    Args:
        path: a run directory, `last`, the end of a run's name or a checkpoint; a folder that `save_pretrained` wrote; or
            owner/name on the Hugging Face hub; or {minilm}. A local folder or run is preferred to the hub.
        pretrained: use its weights; false: the architecture only, with new weights from torch's random state.
        ignore_mismatched: patterns (`*` as in file names) of weights that may be missing, unexpected or of another
            shape; they are newly initialised. Weights of a run always match its net.
        allow_pickle: also read pickles, which can run any code.
        data_sizes: sizes from the data: `image_size` and `in_channels` for images. None: not known yet.
        layers: indices of the layers to keep of a transformers text model, from 0. None: all.

    Raises:
        ValueError: if there is no such model, it cannot read the data, or its weights do not fit.
    """
    path = folder_of(path)
    run_path = _run(path)
    if layers is not None and run_path is not None:
        raise ValueError(f"{files.LAYERS_FLAG} is not supported for a run ({path}): set it to null")
    if run_path is not None:
        backbone = from_run.from_run(run_path, data_sizes)
        _check_modality(backbone.modality, data_sizes, path)
        return backbone if pretrained else rebuild(backbone.description)
    settings = files.read_settings(path)
    modality = files.modality_of(settings, path)
    _check_modality(modality, data_sizes, path)
    files.check_folder(path, modality=modality, pretrained=pretrained, allow_pickle=allow_pickle)
    options: dict[str, Any] = {
        "pretrained": pretrained,
        "ignore_mismatched": list(ignore_mismatched),
        "allow_pickle": allow_pickle,
    }
    if modality == "text":
        return hf_text.from_files(path, settings, layers=layers, **options)
    if layers is not None:
        raise ValueError(f"{files.LAYERS_FLAG} is not supported for a model of images ({path}): set it to null")
    return hf_vision.from_files(path, settings, data_sizes=data_sizes, **options)


def find_text_encoder(path: str, *, pretrained: bool = False, allow_pickle: bool = False) -> TextEncoder | None:
    """Return the tokenizer of a backbone, without its net; None if it reads images.

    Args:
        path: see `build_backbone`.
        pretrained: also check that there are weights, before texts are tokenized for them.
        allow_pickle: see `build_backbone`.

    Raises:
        ValueError: if there is no such model, or it has no tokenizer, or no readable weights.
    """
    path = folder_of(path)
    run_path = _run(path)
    if run_path is not None:
        return from_run.encoder_from_run(run_path)
    settings = files.read_settings(path)
    modality = files.modality_of(settings, path)
    if modality == "images":
        return None
    files.check_folder(path, modality=modality, pretrained=pretrained, allow_pickle=allow_pickle)
    return hf_text.encoder_from_files(path, settings)


def rebuild(description: dict[str, Any]) -> Backbone:
    """Rebuild the architecture of a `Backbone.description`, with new weights; no file is read.

    Raises:
        ValueError: if it is not the description of a backbone.
    """
    if description.get("kind") not in _KINDS:
        raise ValueError(f"not the description of a backbone: {sorted(description)}")
    return _KINDS[description["kind"]](description)


def _run(path: str) -> str | None:
    """Return the run or checkpoint at a path; None if it must be a model of transformers."""
    folder = Path(path)
    if folder.suffix == ".ckpt" or (folder / "config.yaml").is_file():
        return path
    if folder.is_dir() and path != "last":
        return None
    try:
        return str(run.find_run(path))
    except ValueError:
        if path == "last":
            raise
        return None


def _check_modality(modality: str, data_sizes: Mapping[str, int] | None, path: str) -> None:
    if data_sizes is None:
        return
    given = "images" if "image_size" in data_sizes else "text"
    if given != modality:
        raise ValueError(
            f"{files.FLAG} {path} is a model of {modality}, and the data are {given}: set {files.FLAG} or --data to"
            " matching ones"
        )
