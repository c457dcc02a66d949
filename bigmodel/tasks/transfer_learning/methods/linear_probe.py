"""Linear probe: a new head on the features of a frozen backbone, which are computed once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

from bigmodel.tasks.transfer_learning.methods.base import Method, freeze
from bigmodel.tasks.transfer_learning.methods.feature_cache import FeatureCaching

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

    def wrap(self, net: Any, problem_type: str) -> None:
        freeze(net.backbone)

    def callbacks(self, task: TransferLearning) -> list[Callback]:
        return [FeatureCaching(task, remedy=", or --model.method.cache false")] if self.cache else []
