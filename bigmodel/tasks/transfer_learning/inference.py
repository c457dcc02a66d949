"""Predictions of a trained task, for samples in memory and as columns of a table.

n samples, K classes or labels (1 for a number); B images, C channels, S pixels of the square's side.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from bigmodel.data.image_decoding import decode
from bigmodel.run import sizes
from bigmodel.tasks.transfer_learning.batches import text_batch
from bigmodel.tasks.transfer_learning.metrics import Problem

Picture = Image.Image | np.ndarray | Path
Sample = str | tuple[str, str] | Picture


def format_predictions(logits: Tensor, problem: Problem, classes: Sequence[str]) -> dict[str, Any]:
    """Return columns of a table from logits [n, K].

    For one class: `class`, its `probability`, and the `probabilities` [n, K] of all. For several labels: `labels`
    (lists) and `probabilities` [n, K]. Otherwise: the `number`.
    """
    if problem == "number":
        return {"number": logits[:, 0]}
    if problem == "labels":
        probabilities = logits.sigmoid()
        rows = [[classes[i] for i, p in enumerate(row) if p > 0.5] for row in probabilities.tolist()]
        return {"labels": pa.array(rows, pa.list_(pa.string())), "probabilities": probabilities}
    probabilities = logits.softmax(-1)
    probability, predicted = probabilities.max(-1)
    return {
        "class": [classes[i] for i in predicted.tolist()],
        "probability": probability,
        "probabilities": probabilities,
    }


@torch.no_grad()
def predict(task: Any, samples: Sequence[Sample]) -> list[Any]:
    """Return the classes or labels of each sample with their probabilities, the most likely first; or the number.

    Args:
        task: a trained TransferLearning.
        samples: texts, pairs of texts, or images, whichever its backbone reads.

    Raises:
        ValueError: if the task is untrained, or the samples are of another type.
    """
    if not task.facts:
        raise ValueError("this task has learned nothing yet: load it from a run with bigmodel.load")
    batch = _texts(task, samples) if task.net.backbone.modality == "text" else _pictures(task, samples)
    logits = task.logits(task.features(batch)).float()
    if task.problem == "number":
        numbers: list[Any] = logits[:, 0].tolist()
        return numbers
    answers = []
    for row in logits.softmax(-1) if task.problem == "class" else logits.sigmoid():
        probabilities, order = row.sort(descending=True)
        names = [task.facts["classes"][i] for i in order.tolist()]
        answers.append(dict(zip(names, probabilities.tolist(), strict=True)))
    return answers


def _texts(task: Any, samples: Sequence[Sample]) -> Any:
    pairs = [sample for sample in samples if isinstance(sample, tuple)]
    texts = [sample[0] if isinstance(sample, tuple) else sample for sample in samples]
    wrong = [type(text).__name__ for text in texts if not isinstance(text, str)]
    if wrong:
        raise ValueError(f"this task tells of texts, not of a {wrong[0]}")
    if pairs and len(pairs) < len(samples):
        raise ValueError("give pairs of texts alone, or texts alone")
    seconds = [second for _, second in pairs] or None
    batch = text_batch(task.text_encoder, texts, seconds, task.facts.get("max_length"))  # type: ignore[arg-type]
    return type(batch)(*(part.to(task.device) for part in batch))


def _pictures(task: Any, samples: Sequence[Sample]) -> Any:
    size, resize, channels = task.facts["size"], task.facts["resize"], sizes(task)["in_channels"]
    pixels = [decode(picture, channels=channels, size=size, resize=resize) for picture in samples]  # type: ignore[arg-type]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(task.device)  # [B, S, S, C] -> [B, C, S, S]
    return _Pictures(images)


class _Pictures(NamedTuple):
    """Images of a batch as a backbone reads them: [B, C, S, S] uint8."""

    images: Tensor
