"""Losses and predictions of samples, by problem type.

Cross-entropy in nats for single-label classification; binary cross-entropy in nats, the mean over the labels, for
multi-label classification; squared error in units of the training targets' variance for regression.

B samples, K classes or labels (1 for regression).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bigmodel.tasks.transfer_learning.problem_type import MULTI_LABEL, SINGLE_LABEL, ProblemType


def sample_losses(problem_type: ProblemType, logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """Return the loss of each sample [B] from logits [B, K].

    Args:
        problem_type: type of the targets.
        logits: for regression, in the unit of the targets.
        targets: as in a batch.
        scale: standard deviation of the training targets, for regression.
    """
    if problem_type == SINGLE_LABEL:
        return F.cross_entropy(logits, targets, reduction="none")
    if problem_type == MULTI_LABEL:
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1)
    return ((logits[:, 0] - targets) / scale).square()


def sample_predictions(problem_type: ProblemType, logits: Tensor) -> dict[str, Tensor]:
    """Return `predicted` and, for classes and labels, `probability` of each sample, as `Report` expects them."""
    if problem_type == SINGLE_LABEL:
        probability, predicted = logits.softmax(-1).max(-1)
        return {"predicted": predicted, "probability": probability}
    if problem_type == MULTI_LABEL:
        return {"predicted": (logits > 0).float(), "probability": logits.sigmoid()}
    return {"predicted": logits[:, 0]}
