"""Wraps a transformers text classifier as a net of this task, with its own head, unchanged.

B texts, T tokens, D width of the input of the output layer, K classes or labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bigmodel.pretrained import hugging_face, published
from bigmodel.tasks.transfer_learning.backbones.hf_text import encoder_from_files, has_segments
from bigmodel.tasks.transfer_learning.batches import LabelledTextBatch, text_batch
from bigmodel.tasks.transfer_learning.pooling import Last
from bigmodel.tasks.transfer_learning.problem_type import SINGLE_LABEL, ProblemType
from bigmodel.tasks.transfer_learning.tokenization import TextEncoder, TransformersEncoder

_KIND = "text classifier"


class TextClassifier(nn.Module):
    """Maps a batch of texts to logits [B, K]. The head of a decoder is applied to the last token of a text.

    Args:
        model: transformers' model, in evaluation mode.
        text_encoder: its tokenizer.

    Raises:
        ValueError: if its last layer is not linear, or its logits depend on padding.
    """

    def __init__(self, model: Any, text_encoder: TextEncoder) -> None:
        super().__init__()
        self.model, self.last = model, Last()
        model.config.pad_token_id = text_encoder.pad_id  # the model finds the end of a text by it; it may be unset
        self._has_segments = has_segments(model)
        self._probe(text_encoder)

    @torch.no_grad()
    def _probe(self, text_encoder: TextEncoder) -> None:
        """Find the head, and check that logits of a text are the same alone and in a batch with a longer one."""
        texts = ["a", "a a a a a a a a a a a a"]
        one, two = text_batch(text_encoder, texts[:1]), text_batch(text_encoder, texts)
        unpadded = LabelledTextBatch(*(part[:, : int(one.mask.sum())] if part.ndim == 2 else part for part in one))
        name = hugging_face.find_head(self.model, **self._inputs(unpadded))
        if name is None:
            raise ValueError("its last layer is not linear")
        self._head_name = name
        alone = self.model(**self._inputs(unpadded)).logits
        if not torch.allclose(self(two)[:1], alone, rtol=1e-3, atol=1e-4):
            raise ValueError("its logits depend on padding (it ignores attention_mask)")

    @property
    def head(self) -> nn.Linear:
        """The layer that computes the logits."""
        head: Any = self.model.get_submodule(self._head_name)
        return head

    def _inputs(self, batch: Any) -> dict[str, Tensor]:
        inputs = {"input_ids": batch.tokens, "attention_mask": batch.mask.long()}
        return inputs | {"token_type_ids": batch.segments} if self._has_segments else inputs

    def features(self, batch: Any) -> Tensor:
        """Return the input of the output layer, [B, D]."""
        inputs: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        try:
            self.model(**self._inputs(batch))
        finally:
            hook.remove()
        return inputs[0] if inputs[0].ndim == 2 else self.last(inputs[0], batch.mask)

    def logits(self, features: Tensor) -> Tensor:
        """Map features [..., D] to logits [..., K]."""
        logits: Tensor = self.head(features)
        return logits

    def forward(self, batch: Any) -> Tensor:
        """Return logits [B, K] of a batch."""
        return self.logits(self.features(batch))


def as_published(
    path: str,
    flag: str,
    *,
    classes: Sequence[str],
    problem_type: ProblemType,
    text_encoder: TextEncoder | None,
    max_length: int | None,
) -> TextClassifier:
    """Load a text classifier with all of its weights.

    Args:
        path: a folder, or hf://owner/name.
        flag: the flag that the path was given by, for messages.
        classes: the class names of the data; the logits are returned in their order.
        problem_type: type of the targets.
        text_encoder: the tokenizer of the data's texts; None: they are images.
        max_length: T, texts are truncated to it; None: the encoder's limit.

    Raises:
        ValueError: if there is no such model, it has other classes, another tokenizer, a smaller maximum length, or
            lacks a weight.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification

    if text_encoder is None:
        raise ValueError(
            f"{flag} {path}: a student of images in TransferLearning accepts runs as teachers: set {flag} to a run, or"
            " --model.student to ImageClassification"
        )
    settings = published.read_settings(path, flag, _KIND, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING)
    found = settings.problem_type or SINGLE_LABEL
    if found != problem_type:
        raise ValueError(
            f"{flag} {path} was trained for problem_type {found} (its {published.CONFIG}), and --data.problem_type is"
            f" {problem_type}: set {flag} to a model trained for it"
        )
    order = published.class_order(settings, classes, path, flag)
    _check_encoder(path, flag, settings, text_encoder, max_length)
    remedy = f"set {flag} to a model with all weights of its architecture, including its head"
    model = published.load(AutoModelForSequenceClassification, path, flag, _KIND, settings, remedy)
    try:
        net = TextClassifier(model, text_encoder)
    except ValueError as error:
        raise ValueError(f"{flag} {path} ({settings.model_type}) cannot be a teacher: {error}") from error
    published.reorder(net.head, order)
    return net


def _check_encoder(path: str, flag: str, settings: Any, text_encoder: TextEncoder, max_length: int | None) -> None:
    """Check that a model has the tokenizer of the data, and accepts texts of their length."""
    try:
        theirs = encoder_from_files(published.location(path), settings)
    except ValueError as error:
        raise ValueError(f"{flag} {path}: {error}") from error
    if (difference := _difference(theirs, text_encoder)) is not None:
        raise ValueError(
            f"{flag} {path} has another tokenizer than the student ({difference}): set --model.student.backbone or {flag}"
            " to a model with the same tokenizer"
        )
    limit = max_length if max_length is not None else text_encoder.max_length
    if theirs.max_length is not None and (limit is None or limit > theirs.max_length):
        raise ValueError(
            f"{flag} {path} accepts at most {theirs.max_length:,} tokens, and texts have up to"
            f" {'any number' if limit is None else f'{limit:,}'}: set --data.max_length {theirs.max_length}"
        )


def _difference(theirs: TextEncoder, ours: TextEncoder) -> str | None:
    """Describe how the encodings of texts differ; None if they do not."""
    if not isinstance(theirs, TransformersEncoder) or not isinstance(ours, TransformersEncoder):
        return "the tokenizer of a run"
    difference = published.tokenizer_difference(theirs.backend, ours.backend)
    if difference is None and (theirs.special_tokens, theirs.pad_id) != (ours.special_tokens, ours.pad_id):
        difference = "other special tokens around a text"
    return difference
