"""Metrics of each problem type, over all processes.

Matthews' correlation of K classes: Gorodkin 2004 (doi 10.1016/j.compbiolchem.2004.09.006). Spearman's correlation is
Pearson's correlation of the ranks, with mean ranks for ties. A correlation with a constant is 0.

B samples in a batch, N in all, K classes or labels.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional import pearson_corrcoef
from torchmetrics.functional.classification import multilabel_exact_match, multilabel_f1_score

from bigmodel.evaluation import ClassMetrics
from bigmodel.evaluation.class_metrics import AllSamples, check_finite, mean_area, mean_ranks
from bigmodel.nn.accumulation import accumulable
from bigmodel.tasks.transfer_learning.problem_type import REGRESSION, SINGLE_LABEL, ProblemType


class TransferMetrics(Protocol):
    """Interface of the task's metrics for any problem type; they are modules, and move with the net."""

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Update with a batch: logits [B, K] in any floating-point type, and the data's targets; B may be 0.

        Raises:
            ValueError: for other shapes, or classes out of range.
        """

    def compute(self) -> dict[str, Tensor]:
        """Return metrics over all batches of all processes since the last `reset`: float32 by name, none of them NaN.

        Every process must call it.

        Raises:
            ValueError: if there was nothing to evaluate, or the net's outputs were not finite.
        """
        ...

    def confusion(self) -> Tensor | None:
        """Return the confusion matrix [K, K] int64, true class by predicted; None unless single-label."""

    def reset(self) -> None:
        """Clear all batches."""


def make_metrics(problem_type: ProblemType, num_classes: int) -> TransferMetrics:
    """Return the metrics of a problem type, an `nn.Module`.

    Args:
        problem_type: type of the targets.
        num_classes: K; ignored for regression.

    Raises:
        ValueError: if there is only one class.
    """
    if problem_type == REGRESSION:
        return RegressionMetrics()
    return SingleLabelMetrics(num_classes) if problem_type == SINGLE_LABEL else MultiLabelMetrics(num_classes)


class SingleLabelMetrics(ClassMetrics):
    """Metrics of single-label samples: those of `ClassMetrics`, and `matthews`, -1 to 1. Micro-averaged F1 equals the
    accuracy, and is not repeated.
    """

    def compute(self) -> dict[str, Tensor]:
        values = super().compute()
        confusion = accumulable(self.confusion())
        true, predicted, total = confusion.sum(1), confusion.sum(0), confusion.sum()
        covariance = confusion.trace() * total - true @ predicted
        spread = (total**2 - true @ true) * (total**2 - predicted @ predicted)
        # Of counts, a spread below 1 is 0, and so is the covariance.
        return values | {"matthews": (covariance / spread.clamp(min=1).sqrt()).float()}


class _SampleMetrics(nn.Module):
    """Base of metrics that are computed from the outputs and targets of all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.samples = AllSamples()

    def compute(self) -> dict[str, Tensor]:
        """See `TransferMetrics`."""
        return {name: value.float().to(self.samples.device) for name, value in self._compute().items()}

    def _compute(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def _all_samples(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Return the outputs, in float64, and targets of all samples, each of this shape.

        Raises:
            ValueError: if there are none.
        """
        outputs, targets = self.samples.compute() if self.samples.update_called else (torch.empty(0), torch.empty(0))
        if not targets.numel():
            raise ValueError("no labelled samples were evaluated: at least one is required")
        return outputs.double().reshape(-1, *shape), targets.reshape(-1, *shape)  # torchmetrics squeezes a single value

    def confusion(self) -> None:
        """Return None."""

    def reset(self) -> None:
        """Clear all batches."""
        self.samples.reset()


class MultiLabelMetrics(_SampleMetrics):
    """Metrics of multi-label samples; a label is predicted if its probability is above one half.

    `loss` is binary cross-entropy in nats, averaged over samples and labels; `f1_macro` the mean over the labels that
    occur or were predicted, `f1_micro` that of all decisions together, 0 / 0 counting as 0; `auroc` the mean over the
    labels that some samples have and others lack, omitted if there is none; `exact_match` the share of samples with all
    labels correct.

    Args:
        num_labels: K.
    """

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.num_labels = num_labels

    @torch.no_grad()
    def update(self, logits: Tensor, targets: Tensor) -> None:
        """See `TransferMetrics`; targets [B, K] are 0 or 1."""
        if logits.shape != targets.shape or logits.shape[1:] != (self.num_labels,):
            raise ValueError(
                f"received logits {tuple(logits.shape)} and targets {tuple(targets.shape)}; accepted are [B,"
                f" {self.num_labels}] for both"
            )
        self.samples.update(logits.float(), targets > 0)

    def _compute(self) -> dict[str, Tensor]:
        logits, there = self._all_samples(self.num_labels)  # [N, K] each
        loss = F.binary_cross_entropy_with_logits(logits, there.double())
        check_finite(loss)
        predicted = logits > 0
        decisions: dict[str, Any] = {"preds": predicted.int(), "target": there.int(), "num_labels": self.num_labels}
        decisions["validate_args"] = False  # one label, and NaN for 0 / 0, are accepted
        by_label = multilabel_f1_score(**decisions, average="none", zero_division=float("nan"))  # [K]
        values = {
            "loss": loss,
            "f1_macro": by_label.nanmean().nan_to_num(),
            "f1_micro": multilabel_f1_score(**decisions, average="micro"),
            "exact_match": multilabel_exact_match(**decisions),
        }
        auroc = mean_area(logits, there)
        if not torch.isnan(auroc):
            values["auroc"] = auroc
        return values


class RegressionMetrics(_SampleMetrics):
    """Metrics of regression: `loss`, the mean squared error; `rmse` and `mae`, in the unit of the targets; `pearson`
    and `spearman`.
    """

    @torch.no_grad()
    def update(self, logits: Tensor, targets: Tensor) -> None:
        """See `TransferMetrics`; logits [B, 1] are in the unit of the targets [B]."""
        if logits.shape != (len(targets), 1) or targets.ndim != 1:
            raise ValueError(
                f"received predictions {tuple(logits.shape)} and targets {tuple(targets.shape)}; accepted are [B, 1] and [B]"
            )
        self.samples.update(logits[:, 0].float(), targets.float())

    def _compute(self) -> dict[str, Tensor]:
        predicted, targets = self._all_samples()  # [N] each
        targets = targets.double()
        errors = predicted - targets
        loss = errors.square().mean()
        check_finite(loss)
        return {
            "loss": loss,
            "rmse": loss.sqrt(),
            "mae": errors.abs().mean(),
            "pearson": _correlation(predicted, targets),
            "spearman": _correlation(mean_ranks(predicted), mean_ranks(targets)),
        }


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Return Pearson's correlation, in -1 to 1; 0 if one of the two is constant."""
    if x.min() == x.max() or y.min() == y.max():
        return torch.zeros((), dtype=torch.float64)
    return pearson_corrcoef(x, y)
