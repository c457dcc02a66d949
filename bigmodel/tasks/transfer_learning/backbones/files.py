"""Files of a transformers model: contents of a folder, configuration, weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bigmodel.pretrained import hugging_face

FLAG = "--model.backbone"
LAYERS_FLAG = "--model.layers"
_TOKENIZERS = (
    "tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def read_settings(path: str) -> Any:
    """Read the configuration of a model in a folder or on the hub.

    Raises:
        ValueError: if there is none, or its architecture is unknown to transformers.
    """
    from transformers import AutoConfig

    also = "; or a run of `bigmodel fit`, see `bigmodel list`"
    with hugging_face.readable(path, FLAG, "model", also):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def modality_of(settings: Any, path: str) -> str:
    """Return the input type of a model.

    Raises:
        ValueError: neither text nor images, or both.
    """
    from transformers import MODEL_MAPPING

    kind = MODEL_MAPPING.get(type(settings), None)
    kind = kind[0] if isinstance(kind, list | tuple) else kind
    what = {"input_ids": "text", "pixel_values": "images"}.get(getattr(kind, "main_input_name", ""))
    if hasattr(settings, "vision_config") or hasattr(settings, "text_config"):
        raise ValueError(
            f"{FLAG} {path} is a model of several parts ({settings.model_type}): save one part, for example by"
            f" model.vision_model.save_pretrained(folder), and set {FLAG} to that folder"
        )
    if settings.is_encoder_decoder:
        raise ValueError(
            f"{FLAG} {path} is an encoder with a decoder ({settings.model_type}): accepted are encoders such as BERT, and"
            " decoders such as GPT-2"
        )
    if what is None:
        raise ValueError(
            f"{FLAG} {path} ({settings.model_type}) is neither a model of text nor of images: accepted are models of"
            " AutoModel with input_ids or pixel_values"
        )
    return what


def check_folder(path: str, *, modality: str, pretrained: bool, allow_pickle: bool) -> None:
    """Check that a folder contains all required files, before any is read.

    Raises:
        ValueError: no tokenizer, no weights, or pickles only.
    """
    folder = Path(path)
    if not folder.is_dir():
        return  # the model is on the hub
    names = {file.name for file in folder.iterdir()}
    if modality == "text" and not names & set(_TOKENIZERS):
        raise ValueError(
            f"{FLAG} {path} has no tokenizer ({', '.join(_TOKENIZERS)}): save it there by"
            f" transformers.AutoTokenizer.from_pretrained(...).save_pretrained({path!r})"
        )
    if not pretrained or any(name.endswith(".safetensors") for name in names):
        return
    pickles = sorted(name for name in names if name.endswith(_PICKLES) and name != "training_args.bin")
    if not pickles:
        raise ValueError(
            f"{FLAG} {path} has no weights (model.safetensors): save them there, or set --model.pretrained false to train"
            " the architecture from new weights"
        )
    if not allow_pickle:
        raise ValueError(
            f"{FLAG} {path} has its weights as pickles ({pickles[0]}), which can run any code when they are read."
            f" Convert them where you trust them: transformers.AutoModel.from_pretrained({path!r}, use_safetensors=False)"
            ".save_pretrained(NEW_FOLDER), with the tokenizer; or set --model.allow_pickle true"
        )


def from_weights(kind: Any, path: str, settings: Any, allow_pickle: bool) -> tuple[Any, dict[str, Any]]:
    """Return a model with its weights in float32, and transformers' loading report.

    Args:
        kind: a class of transformers that has `from_pretrained`.
        path: a folder, or owner/name.
        settings: the configuration.
        allow_pickle: read pickles where there are no safetensors.

    Raises:
        ValueError: if they cannot be read.
    """
    with hugging_face.readable(path, FLAG, "model with weights"), hugging_face.quiet():
        model, loaded = kind.from_pretrained(
            path,
            config=settings,
            dtype=torch.float32,
            use_safetensors=None if allow_pickle else True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    return model, loaded
