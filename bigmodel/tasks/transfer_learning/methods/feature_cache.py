"""Features of a frozen backbone, computed once for each sample, in evaluation mode, and read from memory-mapped files.

N samples of a split, B rows of a batch, D width of the features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from bigmodel.data.cache import cache_folder
from bigmodel.data.output_cache import FieldSpec, OutputCache, weights_digest
from bigmodel.data.sampling import Loader, sequential_loader
from bigmodel.run import sizes
from bigmodel.tasks.transfer_learning.problem_type import MULTI_LABEL, SINGLE_LABEL

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


class FeatureCaching(Callback):
    """Computes the features of splits at the start of a fit, and replaces the inputs of batches by them.

    Args:
        task: the task whose backbone is frozen. Its `on_before_batch_transfer` calls `replace_inputs`.
        splits: of `train` and `val`.
        remedy: an alternative for messages about data whose features cannot be cached.
    """

    def __init__(self, task: TransferLearning, splits: tuple[str, ...] = ("train", "val"), remedy: str = "") -> None:
        self.task, self.splits, self.remedy = task, splits, remedy
        self.caches: dict[str, OutputCache | None] = {}  # by split

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            check_cacheable(self.task, self.remedy)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        used = [split for split in self.splits if split == "train" or trainer.limit_val_batches]
        self.caches = {split: cache_features(self.task, split) for split in used}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.caches = {}

    def replace_inputs(self, trainer: Trainer, batch: Any) -> Any:
        """Return a `FeatureBatch` in place of a batch of the trainer's current split, if its features are cached."""
        split = "train" if trainer.training else "val" if trainer.validating or trainer.sanity_checking else "other"
        cache = self.caches.get(split)
        if cache is None:
            return batch
        return FeatureBatch(cache.read(batch.index)["features"], batch.targets, batch.index, batch.weight)


def check_cacheable(task: TransferLearning, remedy: str) -> None:
    """Check that features are deterministic per sample: no augmentation, oversampling or sharding.

    Raises:
        ValueError: if they are not; `remedy` is an alternative for the message.
    """
    data: Any = task.trainer.datamodule  # type: ignore[attr-defined]
    problem = None
    if isinstance(task.trainer.strategy, ModelParallelStrategy):
        problem = "a sharded net cannot compute cached features: set --trainer.strategy ddp"
    elif getattr(data, "augmentation", "") or getattr(data, "mix", None):
        problem = (
            "random augmentation changes features, and they are computed once: set --data.augment [], --data.crop null and"
            " --data.mix null"
        )
    elif getattr(data, "cache_on_device", False):
        problem = (
            "--data.cache_on_device true caches images, which are not read when features are cached: set it to false"
        )
    elif getattr(data, "balance", "none") == "samples":
        problem = (
            "--data.balance samples repeats samples within an epoch, and features are computed once: set --data.balance"
            " weights"
        )
    elif task.pooling == "attention":
        problem = "--model.pooling attention is learned, and features are computed once: set --model.pooling mean"
    if problem is not None:
        raise ValueError(f"{problem}{remedy}")


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
            f"cached features require a loader with sample numbers, not a {type(loader).__name__}: create it with"
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
    if task.problem_type == MULTI_LABEL:
        return FieldSpec((sizes(task)["num_classes"],), torch.float32)
    return FieldSpec((), torch.int64 if task.problem_type == SINGLE_LABEL else torch.float32)
