"""Warning about a nearly full disk before a checkpoint fails."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from bigmodel.checkpoint import checkpoint_step, size_on_disk
from bigmodel.training.callbacks.checkpoint import Checkpoint

_COPIES = 3  # times the trainable weights, before the first checkpoint: the weights and two moments, as in Adam


class DiskSpace(Callback):
    """Prints a warning, before training and at each checkpoint, if the disk is too full for the next ones. Always on.

    Each `Checkpoint` callback writes its next file before it deletes its previous one, so one more file of each must
    fit. The size is that of the state about to be saved; before training, that of the newest checkpoint, or three times
    the trainable weights if there is none yet.
    """

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        folder = self._folder(trainer)
        if folder is None:
            return
        earlier = max(folder.glob("*.ckpt"), key=checkpoint_step, default=None)
        trained = sum(p.nbytes for p in pl_module.parameters() if p.requires_grad)
        self._check(trainer, folder, size_on_disk(earlier) if earlier is not None else _COPIES * trained)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        folder = self._folder(trainer)
        if folder is not None:
            self._check(trainer, folder, _bytes(checkpoint))

    @staticmethod
    def _folder(trainer: Any) -> Path | None:
        """Return the checkpoint folder on the first process; None on other processes, and if no checkpoints are written."""
        if not trainer.is_global_zero:
            return None
        return next((Path(c.dirpath) for c in trainer.callbacks if isinstance(c, Checkpoint) and c.dirpath), None)

    @staticmethod
    def _check(trainer: Any, folder: Path, size: int) -> None:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        needed = size * sum(isinstance(callback, Checkpoint) for callback in trainer.callbacks)
        if free < needed:
            print(
                f"warning: {free / 1e9:,.2f} GB are free in {folder}; the next checkpoints need {needed / 1e9:,.2f} GB",
                flush=True,
            )


def _bytes(content: Any) -> int:
    """Return the total size of all tensors in nested dicts and lists, in bytes."""
    if isinstance(content, Tensor):
        return content.nbytes
    if isinstance(content, dict):
        content = list(content.values())
    return sum(map(_bytes, content)) if isinstance(content, list | tuple) else 0
