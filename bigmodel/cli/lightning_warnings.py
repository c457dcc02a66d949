"""Filter of Lightning's messages."""

from __future__ import annotations

import logging
import warnings

_HARMLESS = (
    ".*does not have many workers which may be a bottleneck.*",  # batches are read from memory maps
    ".*Total length of `list` across ranks is zero.*",  # no split for validation
    ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run's own
    ".*module\\(s\\) in eval mode at the start of training.*",  # frozen parts are intended
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ".*Skipping val loop.*",  # bigmodel prints that there is no best checkpoint, and why
    ".*is smaller than the logging interval.*",
    ".*overridden `on_before_batch_transfer` in `LightningModule`.*",  # allowed for a task
    ".*torch.distributed.nn.functional.all_gather is deprecated.*",  # called by Lightning
)


def quiet_lightning() -> None:
    """Suppress Lightning's informational messages and known harmless warnings; other warnings remain."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _HARMLESS:
        warnings.filterwarnings("ignore", message=message)
