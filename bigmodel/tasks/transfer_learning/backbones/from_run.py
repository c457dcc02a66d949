"""A task trained with bigmodel as a backbone: the input of its output layer, for texts or images.

B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from bigmodel.protocols import SupportsExport, SupportsLogits
from bigmodel.run import build, describe, load
from bigmodel.tasks.transfer_learning.backbones.base import Backbone, Modality, probe_of
from bigmodel.tasks.transfer_learning.backbones.files import FLAG
from bigmodel.tasks.transfer_learning.tokenization import LanguageModelEncoder, TextEncoder


class RunBackbone(Backbone):
    """A task that *SupportsLogits* texts or images, of any package, without the head of its net.

    It reads the tokens of a batch, or its images, with the normalisation of its training. The sizes of its net
    determine which of the two: `vocab_size`, or `image_size`.

    Args:
        task: from `bigmodel.load` or `bigmodel.run.build`; its net loses the head.
        data_sizes: `in_channels` and `image_size` of the data; None: those that it was trained on.

    Raises:
        ValueError: if the task has no features of texts or images, or cannot read such images.
    """

    def __init__(self, task: LightningModule, data_sizes: Mapping[str, int] | None = None) -> None:
        super().__init__()
        described = describe(task)
        self.modality = modality_of(described, task)
        if not isinstance(task, SupportsLogits):
            raise ValueError(
                f"{FLAG}: the {type(task).__name__} of this run has no features, logits and targets: set it to a run of a"
                " task with bigmodel.protocols.SupportsLogits"
            )
        self.task = task
        self.text_encoder = text_encoder_of(described, task) if self.modality == "text" else None
        available = data_sizes if data_sizes is not None and "image_size" in data_sizes else described["sizes"]
        sizes = {name: available[name] for name in ("in_channels", "image_size") if name in available}
        net: Any = getattr(task, "net", task)
        self.eval()
        try:
            probe = probe_of(self.modality, sizes, next(task.parameters()).device)
            features, _ = self(probe)
            self._set_pooling(features)
            self._find_parts(net, probe)
        except (RuntimeError, ValueError, TypeError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            if self.modality == "text":
                raise ValueError(f"{FLAG}: this {type(net).__name__} has no features of text ({reason})") from error
            raise ValueError(
                f"{FLAG}: this {type(net).__name__} does not accept images of {sizes['in_channels']} channel(s) and"
                f" {sizes['image_size']} pixels on a side ({reason}): set --data.channels and --data.size to those of its"
                f" training ({_text(described['sizes'])})"
            ) from error
        self.description = {"kind": "own_run", "task": described, "sizes": sizes}
        self.train()

    def _set_pooling(self, features: Tensor) -> None:
        if features.ndim == 2:
            self.pooling = None
        elif features.ndim == 3 and self.modality == "text":
            self.pooling = "last" if self._is_causal() else "mean"
        else:
            raise ValueError(f"its features have shape {list(features.shape)}, not [B, D], or [B, T, D] of texts")

    def forward(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Return [B, T, D] and the mask [B, T] of a batch with tokens and mask; [B, D] and None of one with images."""
        features = self.task.features(batch)
        return features, batch.mask if features.ndim == 3 else None


def from_run(run: str, data_sizes: Mapping[str, int] | None) -> Backbone:
    """Return the backbone of a run, with its weights. A run of transfer learning already contains one."""
    task = load(run)
    net: Any = task.merged_model() if isinstance(task, SupportsExport) else getattr(task, "net", None)
    inside = getattr(net, "backbone", None)
    if isinstance(inside, Backbone):
        inside.requires_grad_(True)
        return inside.train()
    return RunBackbone(task, data_sizes)


def encoder_from_run(run: str) -> TextEncoder | None:
    """Return the tokenizer of a run's task, without building its net; None if it reads images."""
    described = describe(run)
    task: Any = build(described, net=False)
    if hasattr(task, "text_encoder"):  # a run of transfer learning
        encoder: TextEncoder | None = task.text_encoder
        return encoder
    return text_encoder_of(described, task) if modality_of(described, task) == "text" else None


def modality_of(described: Mapping[str, Any], task: LightningModule) -> Modality:
    """Return the input type of a task, from the sizes of its net.

    Raises:
        ValueError: neither texts nor images.
    """
    sizes = described["sizes"]
    if "image_size" in sizes:
        return "images"
    if "vocab_size" in sizes:
        return "text"
    raise ValueError(
        f"{FLAG}: the net of {type(task).__name__} has the sizes {_text(sizes)}: accepted are nets with vocab_size (text) or"
        " image_size (images)"
    )


def text_encoder_of(described: Mapping[str, Any], task: Any) -> TextEncoder:
    """Return the tokenizer in the task's attribute `tokenizer`.

    Raises:
        ValueError: if it has none.
    """
    tokenizer = getattr(task, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(
            f"{FLAG}: the {type(task).__name__} of this run has no tokenizer in its checkpoint (attribute `tokenizer`): set"
            " it to a run with one"
        )
    return LanguageModelEncoder(tokenizer, described["sizes"].get("context_length"))


def from_description(description: Mapping[str, Any]) -> RunBackbone:
    """Return the same architecture, with new weights."""
    return RunBackbone(build(description["task"]), description["sizes"] or None)


def _text(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sizes.items()) or "nothing"
