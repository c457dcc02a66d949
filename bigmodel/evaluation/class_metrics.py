"""Metrics of a classifier over all processes: states are gathered, averages of processes are never averaged.

Expected calibration error: Guo et al. 2017 (arXiv 1706.04599), eq. 3, with 15 bins of equal width. Area under the ROC
curve, each class against the rest: the probability that a sample of the class scores above one of a different class,
ties counting half (Hanley and McNeil 1982), exact and not binned.

B samples in a batch, N in all, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, SumMetric
from torchmetrics.classification import MulticlassCalibrationError, MulticlassConfusionMatrix
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from bigmodel.nn.accumulation import Accumulates, accumulable, accumulation_dtype

_NUM_BINS = 15
_BELOW_ONE = 1 - 2.0**-24  # torchmetrics puts a confidence of exactly 1 into a separate sixteenth bin


class _Sum(Accumulates, SumMetric):
    """Sum in the `accumulation_dtype` of its device."""


class ClassMetrics(nn.Module):
    """Loss, accuracy, and the distribution of errors, from logits and true classes.

    Two classes are treated like any other number: precision, recall and F1 are the mean over both, not those of a
    "positive". The scores of every sample are stored, 4 N K bytes in the main memory of each process (200 MB for 50,000
    samples of 1,000 classes), and sorted once for every class.

    Args:
        num_classes: K, at least 2.

    Raises:
        ValueError: if there are fewer than two classes.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"{num_classes} class(es): at least 2 are needed")
        k = num_classes
        self.num_classes = k
        sums = ("count", "loss", "accuracy", "top5_accuracy") if k > 5 else ("count", "loss", "accuracy")
        self.sums: Any = nn.ModuleDict(
            {name: _Sum(nan_strategy="disable").set_dtype(accumulation_dtype()) for name in sums}
        )
        self.auroc = AUROC()
        self.calibration = MulticlassCalibrationError(k, _NUM_BINS, "l1", validate_args=False)
        self.confusion_matrix = MulticlassConfusionMatrix(k, validate_args=False)

    @torch.no_grad()
    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Args:
            logits: [B, K], any floating-point type; B may be 0.
            targets: [B] int64, each in 0 to K - 1; the caller must leave out padding rows.

        Raises:
            ValueError: for other shapes, or classes out of range.
        """
        if logits.shape != (len(targets), self.num_classes):
            raise ValueError(
                f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} do not match:"
                f" [B, {self.num_classes}] and [B] are needed"
            )
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < self.num_classes:
            raise ValueError(
                f"targets from {int(targets.min())} to {int(targets.max())} among {self.num_classes} classes (-1 is a"
                " sample without a label: it cannot be evaluated)"
            )
        log_p = accumulable(logits).log_softmax(1)  # in float32, probabilities of a confident net would tie at 1
        predicted = logits.argmax(1)
        self.sums["count"].update(float(len(targets)))
        self.sums["loss"].update(-log_p.gather(1, targets[:, None]).sum())
        self.sums["accuracy"].update((predicted == targets).sum())
        if "top5_accuracy" in self.sums:
            self.sums["top5_accuracy"].update((logits.topk(5, dim=1).indices == targets[:, None]).sum())
        self.auroc.update(log_p.float(), targets)
        self.calibration.update(log_p.exp().clamp(max=_BELOW_ONE), targets)
        self.confusion_matrix.update(predicted, targets)

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics over all batches of all processes since the last `reset`; every process must call it.

        They are float32 numbers. `loss` is the mean cross-entropy in nats; the others are in 0 to 1: `accuracy`,
        `top5_accuracy` (with more than five classes), `precision`, `recall`, `f1` (means over the classes
        that occur or were predicted), `auroc` (mean over the classes with positive and negative samples; left out if
        there is none) and `calibration_error`. None is ever NaN.

        Raises:
            ValueError: if there were no samples, or the net's outputs were not finite.
        """
        sums = {name: metric.compute() for name, metric in self.sums.items() if metric.update_called}
        if not sums or sums["count"] == 0:
            raise ValueError("no sample with a label was evaluated")
        values = {name: value / sums["count"] for name, value in sums.items() if name != "count"}
        check_finite(values["loss"])
        values |= _by_class(self.confusion())
        auroc = self.auroc.compute()
        if not torch.isnan(auroc):
            values["auroc"] = auroc
        values["calibration_error"] = self.calibration.compute()
        return {name: value.float() for name, value in values.items()}

    def confusion(self) -> Tensor:
        """Return [K, K] int64: counts of samples of a class (row) predicted as another (column), over all processes."""
        return self.confusion_matrix.compute()

    def reset(self) -> None:
        """Remove all batches."""
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.reset()


def check_finite(loss: Tensor) -> None:
    """Raise if the net has diverged.

    Raises:
        ValueError: if the mean loss is not finite.
    """
    if not torch.isfinite(loss):
        raise ValueError(
            f"the net's outputs are not finite (loss {float(loss)}): training diverged. Set a lower --model.optimizer.lr,"
            " or set --trainer.gradient_clip_val"
        )


def _by_class(confusion: Tensor) -> dict[str, Tensor]:
    """Return the means of precision, recall and F1 over the classes that occur or were predicted; 0 / 0 counts as 0."""
    right = accumulable(confusion.diagonal())
    true, predicted = confusion.sum(1), confusion.sum(0)
    there = true + predicted > 0
    ratios = {"precision": right / predicted.clamp(min=1), "recall": right / true.clamp(min=1)}
    ratios["f1"] = 2 * right / (true + predicted).clamp(min=1)
    return {name: ratio[there].mean() for name, ratio in ratios.items()}


class AllSamples(Metric):
    """Stores scores and targets of all samples, for metrics that cannot be computed from sums; in main memory."""

    full_state_update = False
    scores: list[Tensor]
    targets: list[Tensor]

    def __init__(self) -> None:
        super().__init__(compute_on_cpu=True, dist_sync_fn=self._gather)
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    def _gather(self, state: Tensor, group: Any = None) -> list[Tensor]:
        """Gather the state of every process: it is stored in main memory, but sent from device to device."""
        return [part.cpu() for part in gather_all_tensors(state.to(self.device), group)]

    def update(self, scores: Tensor, targets: Tensor) -> None:
        """Add a batch: scores [B] or [B, K], and their targets."""
        self.scores.append(scores)
        self.targets.append(targets)

    def compute(self) -> Any:
        """Return all scores and targets, of all processes."""
        return dim_zero_cat(self.scores), dim_zero_cat(self.targets)


class AUROC(AllSamples):
    """Mean over classes of the area under the ROC curve against the rest; NaN if no class has both.

    Scores [B, K] may be in any unit that increases with the probability; targets are class numbers [B], or for several
    labels [B, K] 0 or 1. torchmetrics' version warns about absent classes, counts them as 0, and sums in float32.
    """

    def compute(self) -> Tensor:
        """Return a number on the device, in its `accumulation_dtype`."""
        scores, targets = super().compute()  # [N, K], [N] or [N, K]
        if targets.ndim == 1:
            targets = targets[:, None] == torch.arange(scores.shape[1])
        return mean_area(scores, targets > 0).to(accumulation_dtype(self.device)).to(self.device)


def mean_area(scores: Tensor, positive: Tensor) -> Tensor:
    """Return the mean area under the ROC curve over the columns with positives and negatives; NaN if there is none.

    Args:
        scores: [N, K].
        positive: [N, K] bool.
    """
    columns = [k for k, count in enumerate(positive.sum(0).tolist()) if 0 < count < len(scores)]
    return torch.tensor([_area(scores[:, k], positive[:, k]) for k in columns], dtype=torch.float64).mean()


def _area(scores: Tensor, positive: Tensor) -> float:
    """Return the fraction of (positive, negative) pairs with the positive score higher, ties half: from its rank sum."""
    num_positive = int(positive.sum())
    num_negative = len(scores) - num_positive
    above = float(mean_ranks(scores)[positive].sum()) - num_positive * (num_positive + 1) / 2
    return above / (num_positive * num_negative)


def mean_ranks(values: Tensor) -> Tensor:
    """Return the rank of each value from 1, [N] float64; ties have the mean of their ranks."""
    _, place, ties = values.unique(return_inverse=True, return_counts=True)
    return (ties.cumsum(0).double() - (ties - 1) / 2)[place]
