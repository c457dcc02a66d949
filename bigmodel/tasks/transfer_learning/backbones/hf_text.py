"""Any encoder or decoder of transformers as a backbone: maps tokens to the features of the last layer.

B texts, T tokens, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from bigmodel.data.cache import say
from bigmodel.pretrained import hugging_face
from bigmodel.tasks.transfer_learning.backbones.base import Backbone, Pooling, probe_of
from bigmodel.tasks.transfer_learning.backbones.files import LAYERS_FLAG, from_weights
from bigmodel.tasks.transfer_learning.tokenization import TextEncoder, read_encoder

# Their positions are counted from the padding token's id, so that the first positions are unused.
_POSITIONS_AFTER_PAD = {
    "camembert", "data2vec-text", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl",
    "xmod",
}  # fmt: skip


class HuggingFaceText(Backbone):
    """A model of transformers that reads text, without its heads.

    Padding is on the right and masked, in decoders too; positions are counted over the real tokens. A net is causal
    if its first feature does not depend on the second token: then pooling is `last`, else `mean`.

    Args:
        model: a transformers model that returns `last_hidden_state`.
        text_encoder: its tokenizer.
        pooling: of a net that was built before; None: determine it.
    """

    modality = "text"

    def __init__(self, model: Any, text_encoder: TextEncoder, pooling: Pooling | None = None) -> None:
        super().__init__()
        self.model, self.text_encoder = model, text_encoder
        model.config.use_cache = False  # nothing is generated
        self._has_segments = has_segments(model)
        self._has_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.eval()  # a new model is in training mode
        self.pooling = pooling or "mean"
        if pooling is None and self._is_causal():
            self.pooling = "last"
        self.dropped = self._find_parts(model, probe_of("text", {}, model.device))
        self.description = {
            "kind": "hugging_face_text",
            "settings": hugging_face.plain_settings(model.config),
            "text_encoder": text_encoder.to_dict(),
            "pooling": self.pooling,
        }
        self.train()

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return [B, T, D] and the mask [B, T] of a batch with tokens, mask and segments [B, T]."""
        options = {}
        if self._has_segments:
            options["token_type_ids"] = batch.segments
        if self.pooling == "last" and self._has_positions:
            options["position_ids"] = (batch.mask.cumsum(1) - 1).clamp(min=0)
        found = self.model(input_ids=batch.tokens, attention_mask=batch.mask.long(), **options)
        return found.last_hidden_state, batch.mask


def has_segments(model: Any) -> bool:
    """True if a model of transformers reads token type ids."""
    arguments = inspect.signature(model.forward).parameters
    return "token_type_ids" in arguments and (getattr(model.config, "type_vocab_size", None) or 0) > 1


def from_files(
    path: str,
    settings: Any,
    *,
    pretrained: bool,
    ignore_mismatched: Iterable[str],
    allow_pickle: bool,
    layers: Sequence[int] | None = None,
) -> HuggingFaceText:
    """Load the backbone from a folder or the hub; see `build_backbone`."""
    from transformers import AutoModel

    encoder = encoder_from_files(path, settings)
    if not pretrained:
        model, loaded = AutoModel.from_config(settings, dtype=torch.float32), None
    else:
        model, loaded = from_weights(AutoModel, path, settings, allow_pickle)
    if layers is not None:
        _select_layers(model, layers, path)
    backbone = HuggingFaceText(model, encoder)
    if loaded is None:
        return backbone
    problems = hugging_face.mismatches(loaded, "the model")
    unread = tuple(f"{name.removeprefix('model.')}." for name in backbone.dropped)
    prefix = f"{model.base_model_prefix}."
    is_whole = type(model).__name__ in (settings.architectures or [type(model).__name__])
    # In a file of a model with a head, weights outside the head have a prefix.
    heads = {
        name
        for name, problem in problems.items()
        if problem == hugging_face.LEFT_OVER and not is_whole and not name.startswith(prefix)
    }
    fitting = {name: problem for name, problem in problems.items() if name not in heads and not name.startswith(unread)}
    hugging_face.check_weights(
        fitting,
        loaded["error_msgs"],
        ignore_mismatched,
        path,
        "check that config.json is of the same model; to initialise them newly, name them in --model.ignore_mismatched",
    )
    left = sorted({name.partition(".")[0] for name in heads})
    if left:
        rank_zero_only(say)(f"{path}: ignored, as parts of the head of {settings.architectures[0]}: {', '.join(left)}")
    return backbone


def _select_layers(model: Any, layers: Sequence[int], path: str) -> None:
    """Remove all other layers of a model; the order stays.

    Raises:
        ValueError: if there are no such layers, or the model has no single list of layers.
    """
    count = model.config.num_hidden_layers
    wrong = [layer for layer in layers if not 0 <= layer < count]
    if wrong or not layers or list(layers) != sorted(set(layers)):
        raise ValueError(
            f"{LAYERS_FLAG} {list(layers)}: accepted are layers of {path}, 0 to {count - 1}, in rising order"
        )
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(lists) != 1 or getattr(model.config, "layer_types", None) is not None:
        raise ValueError(
            f"{LAYERS_FLAG} requires a model with all layers of one kind in one list, which {path}"
            f" ({model.config.model_type}) is not: set it to null"
        )
    name, all_layers = lists[0]
    model.set_submodule(name, nn.ModuleList([all_layers[layer] for layer in layers]))
    model.config.num_hidden_layers = len(layers)


def encoder_from_files(path: str, settings: Any) -> TextEncoder:
    """Load the tokenizer of a folder or of the hub, with the number of positions of the model.

    Raises:
        ValueError: if there is none.
    """
    encoder = read_encoder(path)
    positions = getattr(settings, "max_position_embeddings", None)
    if positions is not None and settings.model_type in _POSITIONS_AFTER_PAD:
        positions -= settings.pad_token_id + 1
    limits = [limit for limit in (encoder.max_length, positions) if limit is not None and limit > 0]
    encoder.max_length = min(limits, default=None)
    return encoder


def from_description(description: dict[str, Any]) -> HuggingFaceText:
    """Return the same architecture, with new weights."""
    from transformers import AutoConfig, AutoModel

    settings = AutoConfig.for_model(**description["settings"])
    model = AutoModel.from_config(settings, dtype=torch.float32)
    return HuggingFaceText(model, TextEncoder.from_dict(description["text_encoder"]), description["pooling"])
