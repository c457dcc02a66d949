"""Predictions of a trained task, for samples in memory and as columns of a table.

n samples, K classes or labels (1 for regression); B images, C channels, S pixels of the square's side.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from bigmodel.data.image_decoding import decode
from bigmodel.run import sizes
from bigmodel.tasks.transfer_learning.backbones.base import Images
from bigmodel.tasks.transfer_learning.batches import text_batch
from bigmodel.tasks.transfer_learning.problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL, ProblemType

ImageInput = Image.Image | np.ndarray | Path
Sample = str | tuple[str, str] | ImageInput


def prediction_columns(data: Any, modality: str, numbers: Sequence[int]) -> dict[str, list[Any]]:
    """Return the columns of a table that identify the predicted samples: `text` and `pair`, or `path`.

    Args:
        data: the data module.
        modality: `text` or `images`.
        numbers: of the samples [n].
    """
    if modality != "text":
        images = data.images("all")
        return {"path": [images.name(i) for i in numbers]}
    texts = data.texts("all")
    columns = {"text": [texts.text(i) for i in numbers]}
    return columns | {"pair": [texts.pair(i) for i in numbers]} if texts.paired else columns


def format_predictions(logits: Tensor, problem_type: ProblemType, classes: Sequence[str]) -> dict[str, Any]:
    """Return columns of a table from logits [n, K].

    Single-label: `class`, its `probability`, and the `probabilities` [n, K] of all. Multi-label: `labels` (lists) and
    `probabilities` [n, K]. Regression: the `number`.
    """
    if problem_type == REGRESSION:
        return {"number": logits[:, 0]}
    if problem_type == MULTI_LABEL:
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
    """Return the classes or labels of each sample with their probabilities, the most likely first; in regression, the
    number.

    Args:
        task: a trained TransferLearning.
        samples: texts, pairs of texts, or images, whichever its backbone reads.

    Raises:
        ValueError: if the task is untrained, or the samples are of another type.
    """
    if not task.data_metadata:
        raise ValueError("this task is not trained: load it from a run with bigmodel.load")
    batch = _texts(task, samples) if task.net.backbone.modality == "text" else _images(task, samples)
    logits = task.logits(task.features(batch)).float()
    if task.problem_type == REGRESSION:
        numbers: list[Any] = logits[:, 0].tolist()
        return numbers
    answers = []
    for row in logits.softmax(-1) if task.problem_type == SINGLE_LABEL else logits.sigmoid():
        probabilities, order = row.sort(descending=True)
        names = [task.data_metadata["classes"][i] for i in order.tolist()]
        answers.append(dict(zip(names, probabilities.tolist(), strict=True)))
    return answers


def _texts(task: Any, samples: Sequence[Sample]) -> Any:
    pairs = [sample for sample in samples if isinstance(sample, tuple)]
    texts = [sample[0] if isinstance(sample, tuple) else sample for sample in samples]
    wrong = [type(text).__name__ for text in texts if not isinstance(text, str)]
    if wrong:
        raise ValueError(f"received a {wrong[0]}; the backbone of this task accepts texts and pairs of texts")
    if pairs and len(pairs) < len(samples):
        raise ValueError("received texts and pairs of texts; accepted are either only texts, or only pairs")
    seconds = [second for _, second in pairs] or None
    batch = text_batch(task.text_encoder, texts, seconds, task.data_metadata.get("max_length"))  # type: ignore[arg-type]
    return type(batch)(*(part.to(task.device) for part in batch))


def _images(task: Any, samples: Sequence[Sample]) -> Any:
    size, resize, channels = task.data_metadata["size"], task.data_metadata["resize"], sizes(task)["in_channels"]
    pixels = [decode(image, channels=channels, size=size, resize=resize) for image in samples]  # type: ignore[arg-type]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(task.device)  # [B, S, S, C] -> [B, C, S, S]
    return Images(images)
