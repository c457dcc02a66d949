"""Features of a frozen backbone, computed once for each sample, in evaluation mode, and read from memory-mapped files.

N samples of a split, B rows of a batch, D width of the features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from bigmodel.data.cache import cache_folder
from bigmodel.data.output_cache import FieldSpec, OutputCache, weights_digest
from bigmodel.data.sampling import Loader, sequential_loader
from bigmodel.run import sizes

if TYPE_CHECKING:
    from bigmodel.tasks.transfer_learning.module import TransferLearning

_ROWS = 64  # samples that a process takes at once


class FeatureBatch(NamedTuple):
    """A batch with cached features instead of inputs.

    Attributes:
        features: [B, D] float32, pooled, before dropout.
        targets: as in the data.
        index: [B] int64, number of the sample in its split.
        weight: [B] float32, 0 for padding rows.
    """

    features: Tensor
    targets: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    weight: Tensor


def check_cacheable(task: TransferLearning, remedy: str) -> None:
    """Check that features are deterministic per sample: no augmentation, oversampling or sharding.

    Raises:
        ValueError: if they are not; `remedy` is an alternative for the message.
    """
    data: Any = task.trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(task.trainer.strategy, ModelParallelStrategy):
        raise ValueError(f"features are computed once by a net that is whole: set --trainer.strategy ddp{remedy}")
    changing = [name for name in ("augment", "mix", "crop") if getattr(data, name, None)]
    if changing:
        given = "[]" if changing[0] == "augment" else "null"
        raise ValueError(
            f"--data.{changing[0]} gives a picture other features each time it is met, and they are computed once: set"
            f" --data.{changing[0]} {given}{remedy}"
        )
    if getattr(data, "cache_on_device", False):
        raise ValueError(
            f"--data.cache_on_device true: no picture is needed once its features are known; set it to false{remedy}"
        )
    if getattr(data, "balance", "none") == "samples":
        raise ValueError(
            "--data.balance samples meets a sample several times an epoch, and its features are computed once: set"
            f" --data.balance weights{remedy}"
        )
    if task.pooling == "attention":
        raise ValueError(
            f"--model.pooling attention is learned, and features are computed once: choose another{remedy}"
        )


def cache_features(task: TransferLearning, split: str) -> OutputCache | None:
    """Compute the features of a split, unless they are cached for this backbone and these data.

    Args:
        task: with its net and its trainer.
        split: `train` or `val`.

    Returns:
        A store with the fields `features` [D] float32, and `targets` as in the data; None if there is no such split.
    """
    trainer, net = task.trainer, task.net
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    loader = data.train_dataloader() if split == "train" else data.val_dataloader()
    if not isinstance(loader, Loader):
        if isinstance(loader, list) and not loader:
            return None
        raise ValueError(
            f"features are kept by the numbers of samples, which a {type(loader).__name__} does not know: make it with"
            " bigmodel.data.sampling, or set --model.method.cache false"
        )
    key = {
        "weights": weights_digest(net.backbone),
        "backbone": net.backbone.description,
        "pooling": task.pooling,
        "data": data.fingerprint,
        "split": split,
        "precision": str(trainer.precision),
    }
    outputs = OutputCache(
        cache_folder("transfer_learning", getattr(data, "cache_dir", None)) / "features",
        key,
        loader.num_samples,
        {"features": FieldSpec((net.backbone.width,), torch.float32), "targets": _target_field(task)},
        what=f"features of the {split} split",
        remedy="set --data.cache_dir to a folder on a larger disk, or --model.method.cache false",
    )

    def compute(batch: Any) -> dict[str, Tensor]:
        batch = trainer.strategy.batch_to_device(batch)
        with trainer.precision_plugin.forward_context():
            return {"features": net.features(batch).float(), "targets": batch.targets}

    rows = min(_ROWS, data.micro_batch_size or data.batch_size)
    training = net.training
    net.eval()
    outputs.compute(trainer, lambda view: sequential_loader(loader, rows=rows, trainer=trainer), compute)
    net.train(training)
    return outputs


def _target_field(task: TransferLearning) -> FieldSpec:
    if task.problem == "labels":
        return FieldSpec((sizes(task)["num_classes"],), torch.float32)
    return FieldSpec((), torch.int64 if task.problem == "class" else torch.float32)
