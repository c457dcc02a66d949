"""What to look at after an evaluation: the confusion matrix, and the pictures that the net was most wrong about."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from bigmodel.run import directory
from bigmodel.tasks.image_classification.drawings import Mistake, draw_confusion, draw_mistakes

_COLUMNS = ("loss", "index", "target", "predicted", "probability")


class Report(Callback):
    """Draws `<split>_confusion.png` and `<split>_mistakes.png` into the run directory and to W&B: when training ends, of the
    last validation; and after `bigmodel validate` and `test`. Always on.

    Args:
        num_mistakes: so many pictures at most, those of the largest loss among the wrong ones.
    """

    def __init__(self, num_mistakes: int = 40) -> None:
        self.num_mistakes = num_mistakes
        self._worst: Tensor | None = None  # [M, 5], see _COLUMNS; float64 holds any index
        self._confusion: Tensor | None = None  # [K, K]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._worst = self._confusion = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._worst = self._confusion = None

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        rows = torch.stack([outputs[name].double() for name in _COLUMNS], dim=1)  # [n, 5]
        right = outputs["target"] == outputs["predicted"]
        rows[:, 0].masked_fill_(right, -1)  # a loss is never negative: these stand behind
        self._worst = self._largest(rows if self._worst is None else torch.cat([self._worst, rows]))

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.on_validation_batch_end(*args, **kwargs)

    def _largest(self, rows: Tensor) -> Tensor:
        order = rows[:, 0].argsort(descending=True, stable=True)
        return rows[order[: self.num_mistakes]]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._gather(pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._gather(pl_module)

    def _gather(self, pl_module: LightningModule) -> None:
        """Over all processes, before the task resets its metrics."""
        task: Any = pl_module
        self._confusion = task.metrics.confusion()
        if pl_module.trainer.world_size > 1 and self._worst is not None:
            filled = self._worst.new_full((self.num_mistakes, len(_COLUMNS)), -1)
            filled[: len(self._worst)] = self._worst
            everyone: Any = pl_module.all_gather(filled)  # [W, M, 5]
            self._worst = self._largest(everyone.flatten(0, 1))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module, "val")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._draw(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module, "test")

    def _draw(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        folder = directory(trainer)
        if not trainer.is_global_zero or folder is None or self._confusion is None or self._worst is None:
            return
        data: Any = getattr(trainer, "datamodule", None)
        paths = [folder / f"{split}_confusion.png", folder / f"{split}_mistakes.png"]
        draw_confusion(self._confusion.cpu().numpy(), data.classes, paths[0])
        images, mistakes = data.images(split), []
        for loss, *facts, probability in self._worst.tolist():
            if loss < 0:
                break
            index, target, predicted = map(int, facts)
            picture: np.ndarray = images.read([index])[0]
            mistakes.append(
                Mistake(picture, data.classes[target], data.classes[predicted], probability, images.name(index))
            )
        if mistakes:
            draw_mistakes(mistakes, paths[1])
        else:
            paths[1].unlink(missing_ok=True)  # an earlier evaluation's
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                for path in paths:
                    if path.exists():
                        logger.log_image(f"{split}/{path.stem.partition('_')[2]}", [str(path)])
