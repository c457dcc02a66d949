"""Report of an evaluation: the confusion matrix, and the samples with the largest loss among the errors.

n samples of a batch, M mistakes, K classes or labels, W processes.
"""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from bigmodel.evaluation.plots import Mistake, draw_confusion, draw_mistakes
from bigmodel.nn.accumulation import accumulation_dtype
from bigmodel.run import directory

_FIELDS = ("target", "predicted", "probability")


class Report(Callback):
    """Writes a classifier's errors to the run directory and to W&B. Always on.

    It runs when training ends, for the last validation; and after `bigmodel validate` and `test`. It writes
    `<split>_confusion.png`, and the mistakes, the largest loss first: of images `<split>_mistakes.png`, of texts
    `<split>_mistakes.csv`.

    The task needs an attribute `metrics` with a method `confusion()`, which returns [K, K] int64, or None if not
    applicable; and steps of validation and test that return, for the batch's rows without padding, `index` [n], `loss`
    [n], and

    * for one class per sample: `target` and `predicted` [n], class numbers, and `probability` [n] of the predicted one;
    * for several labels per sample: `target` and `predicted` [n, K], 0 or 1, and `probability` [n, K];
    * for a number per sample: `target` and `predicted` [n].

    The data need `classes`, and `images(split)`, with `read(numbers)` and `name(number)`, or `texts(split)[number]`.

    Args:
        num_mistakes: maximum number of mistakes; by default 40 images or 200 texts.
    """

    def __init__(self, num_mistakes: int | None = None) -> None:
        self.num_mistakes = num_mistakes
        self._widths: dict[str, int] = {}  # number of columns in _worst for each of _FIELDS
        self._multi_label = False
        # [M, 2 + ...]: loss, index, _FIELDS. float64 holds any index; in main memory if the device has none.
        self._worst: Tensor | None = None
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
        if trainer.sanity_checking:
            return
        num_rows = len(outputs["loss"])
        given = {name: outputs[name] for name in _FIELDS if name in outputs}
        # The number of columns is not left to view: there may be 0 rows.
        fields = {name: field.view(num_rows, math.prod(field.shape[1:])) for name, field in given.items()}
        self._widths = {name: field.shape[1] for name, field in fields.items()}
        self._multi_label = outputs["target"].ndim == 2
        columns = [outputs["loss"][:, None], outputs["index"][:, None], *fields.values()]
        if accumulation_dtype(columns[0].device) != torch.float64:
            columns = [column.cpu() for column in columns]
        rows = torch.cat([column.double() for column in columns], dim=1)
        right = (fields["target"] == fields["predicted"]).all(1)
        rows[:, 0].masked_fill_(right.to(rows.device), -1)  # a loss is never negative: sorts these last
        self._worst = self._largest(trainer, rows if self._worst is None else torch.cat([self._worst, rows]))

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.on_validation_batch_end(*args, **kwargs)

    def _largest(self, trainer: Trainer, rows: Tensor) -> Tensor:
        order = rows[:, 0].argsort(descending=True, stable=True)
        return rows[order[: self._max_mistakes(trainer)]]

    def _max_mistakes(self, trainer: Trainer) -> int:
        return self.num_mistakes or (200 if hasattr(_data(trainer), "texts") else 40)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._gather(pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._gather(pl_module)

    def _gather(self, pl_module: LightningModule) -> None:
        """Gather over all processes, before the task resets its metrics."""
        task: Any = pl_module
        self._confusion = task.metrics.confusion()
        if pl_module.trainer.world_size > 1 and self._worst is not None:
            filled = self._worst.new_full((self._max_mistakes(pl_module.trainer), self._worst.shape[1]), -1)
            filled[: len(self._worst)] = self._worst
            gathered: Any = pl_module.all_gather(filled)  # [W, M, 2 + ...]
            self._worst = self._largest(pl_module.trainer, gathered.flatten(0, 1))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, "val")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._write(trainer, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, "test")

    def _write(self, trainer: Trainer, split: str) -> None:
        folder = directory(trainer)
        if not trainer.is_global_zero or folder is None or self._worst is None:
            return
        data, texts = _data(trainer), hasattr(_data(trainer), "texts")
        drawings = []
        if self._confusion is not None:
            drawings.append(folder / f"{split}_confusion.png")
            draw_confusion(
                self._confusion.cpu().numpy(), data.classes, drawings[0], unit="texts" if texts else "images"
            )
        wrong = self._worst[self._worst[:, 0] >= 0]
        path = folder / f"{split}_mistakes.{'csv' if texts else 'png'}"
        rows: list[list[Any]] = []
        if not len(wrong):
            path.unlink(missing_ok=True)  # of an earlier evaluation
        elif texts:
            rows = self._list(wrong, data, split, path)
        else:
            _draw(wrong, data, split, path)
            drawings.append(path)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                for drawing in drawings:
                    logger.log_image(f"{split}/{drawing.stem.partition('_')[2]}", [str(drawing)])
                if rows:
                    logger.log_table(f"{split}/mistakes", columns=rows[0], data=rows[1:])

    def _list(self, wrong: Tensor, data: Any, split: str, path: Path) -> list[list[Any]]:
        """Write the mistakes as a table; return its rows, including the header."""
        texts, parts = data.texts(split), wrong[:, 2:].split(list(self._widths.values()), dim=1)
        fields = {name: part.tolist() for name, part in zip(self._widths, parts, strict=True)}
        rows: list[list[Any]] = [["text", "true", *list(self._widths)[1:], "loss"]]
        for number, (loss, index) in enumerate(wrong[:, :2].tolist()):
            row = {name: values[number] for name, values in fields.items()}
            rows.append([texts[int(index)], *_format_row(row, data.classes, self._multi_label), f"{loss:.4g}"])
        partial = path.with_name(f".{path.name}.partial")
        with open(partial, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows)
        os.replace(partial, path)
        return rows


def _format_row(row: dict[str, list[float]], classes: list[str], multi_label: bool) -> list[str]:
    """Format a row's target, prediction and probability."""
    target, predicted, probability = row["target"], row["predicted"], row.get("probability")
    if probability is None:
        return [f"{target[0]:.6g}", f"{predicted[0]:.6g}"]
    if not multi_label:
        return [classes[int(target[0])], classes[int(predicted[0])], f"{probability[0]:.4f}"]
    chosen = [k for k, there in enumerate(predicted) if there]
    true = "; ".join(name for name, there in zip(classes, target, strict=True) if there)
    return [true, "; ".join(classes[k] for k in chosen), "; ".join(f"{probability[k]:.4f}" for k in chosen)]


def _draw(wrong: Tensor, data: Any, split: str, path: Path) -> None:
    """Draw the mistakes on a sheet."""
    images, mistakes = data.images(split), []
    for _, *fields, probability in wrong.tolist():
        index, target, predicted = map(int, fields)
        image: np.ndarray = images.read([index])[0]
        mistakes.append(Mistake(image, data.classes[target], data.classes[predicted], probability, images.name(index)))
    draw_mistakes(mistakes, path)


def _data(trainer: Trainer) -> Any:
    return getattr(trainer, "datamodule", None)
