"""Linear probe: a new head on the features of a frozen backbone, which are computed once. B rows, D width."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bigmodel.data.output_cache import OutputCache
from bigmodel.tasks.transfer_learning.methods.base import Method, freeze
from bigmodel.tasks.transfer_learning.methods.feature_cache import FeatureBatch, cache_features, check_cacheable

if TYPE_CHECKING:
    from bigmodel.tasks.transfer_learning.module import TransferLearning


class LinearProbe(Method):
    """Trains the head on a frozen backbone in evaluation mode.

    Args:
        cache: compute the features of training and validation samples once, before training, and read them from the
            cache; it is shared with other runs of the same backbone on the same data, with another learning rate for
            example. False: compute them each time, as augmentation requires.

    Raises:
        ValueError: if features are cached and differ each time.
    """

    def __init__(self, cache: bool = True) -> None:
        self.cache = cache
        self.kept: dict[str, OutputCache | None] = {}  # by split

    def prepare(self, net: Any, problem: str) -> None:
        freeze(net.backbone)

    def setup(self, task: TransferLearning) -> None:
        if self.cache:
            check_cacheable(task, ", or --model.method.cache false")

    def on_fit_start(self, task: TransferLearning) -> None:
        if self.cache:
            self.kept = {"train": cache_features(task, "train")}
            if task.trainer.limit_val_batches:
                self.kept["val"] = cache_features(task, "val")

    def before_transfer(self, task: TransferLearning, batch: Any) -> Any:
        trainer = task.trainer
        split = "train" if trainer.training else "val" if trainer.validating or trainer.sanity_checking else "other"
        kept = self.kept.get(split)
        if kept is None:
            return batch
        return FeatureBatch(kept.read(batch.index)["features"], batch.targets, batch.index, batch.weight)

    def on_fit_end(self, task: TransferLearning) -> None:
        self.kept = {}
