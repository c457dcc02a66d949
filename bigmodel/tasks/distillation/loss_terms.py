"""The terms of a distillation loss: each is a loss of `losses` with a weight and the schedule of the weight.

A term is a sum over the positions that count: the samples, or all tokens that are predicted. A term of intermediate
features counts once for each such position of the sample.

B samples, n positions, K classes, C channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigmodel.tasks.distillation import losses
from bigmodel.training.schedules import Schedule

_END = 10**9  # optimizer steps, after the warm-up of any schedule


class Term(nn.Module, ABC):
    """A term of the loss; abstract.

    Args:
        weight: factor of the term, 0 or above.
        schedule: multiplies the weight over the run's optimizer steps, like a learning rate schedule; null: constant.
    """

    def __init__(self, weight: float = 1.0, schedule: Schedule | None = None) -> None:
        super().__init__()
        if not 0 <= weight < float("inf"):
            raise ValueError(
                f"--model.losses: {type(self).__name__} has weight {weight}, which must be a number of 0 or above"
            )
        self.weight, self.schedule = weight, schedule

    @property
    def is_scheduled(self) -> bool:
        """True if any of its settings changes in a run."""
        return self.schedule is not None or getattr(self, "temperature_schedule", None) is not None

    def weight_at(self, step: int, total: int) -> float:
        """Return the weight in optimizer step `step` (from 0) of a run of `total`."""
        return self.weight * (self.schedule(step, total) if self.schedule is not None else 1.0)


class PredictionTerm(Term):
    """Compares the predictions of student and teacher at each position; abstract.

    Args:
        weight, schedule: as for every term.
        temperature: T, divides the logits, above 0.
        temperature_schedule: multiplies T over the run's optimizer steps; null: constant.
    """

    needs_classes = False  # True: also needs the classes of the targets

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float = 4.0,
        schedule: Schedule | None = None,
        temperature_schedule: Schedule | None = None,
    ) -> None:
        super().__init__(weight, schedule)
        if not 0 < temperature < float("inf"):
            raise ValueError(
                f"--model.losses: {type(self).__name__} has temperature {temperature}, which must be a number above 0"
            )
        if temperature_schedule is not None and temperature_schedule(_END, _END) <= 0:
            raise ValueError(
                f"--model.losses: {type(self).__name__} ends at temperature {temperature_schedule(_END, _END):g}, which must"
                " be above 0: set another end of its temperature_schedule (final, gamma)"
            )
        self.temperature, self.temperature_schedule = temperature, temperature_schedule

    def temperature_at(self, step: int, total: int) -> float:
        """Return T in optimizer step `step` (from 0) of a run of `total`."""
        factor = self.temperature_schedule(step, total) if self.temperature_schedule is not None else 1.0
        return self.temperature * factor

    @abstractmethod
    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Return the loss of each position [n].

        Args:
            student, teacher: log-probabilities [n, K] at the temperature.
            targets: classes [n] int64 of positions that count, any class elsewhere.
            temperature: T.
        """


class KD(PredictionTerm):
    """T^2 KL(teacher || student); arguments as for `PredictionTerm`."""

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor, temperature: float) -> Tensor:
        return losses.kd(student, teacher, temperature)


class DKD(PredictionTerm):
    """Decoupled KD: divergences of the target class against the rest, and among the other classes.

    Args:
        alpha: factor of the first, 0 or above.
        beta: factor of the second, 0 or above.
        weight, temperature, schedule, temperature_schedule: as for `PredictionTerm`.
    """

    needs_classes = True

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        weight: float = 1.0,
        temperature: float = 4.0,
        schedule: Schedule | None = None,
        temperature_schedule: Schedule | None = None,
    ) -> None:
        super().__init__(weight, temperature, schedule, temperature_schedule)
        if not (0 <= alpha < float("inf") and 0 <= beta < float("inf")):
            raise ValueError(
                f"--model.losses: DKD has alpha {alpha} and beta {beta}, which must be numbers of 0 or above"
            )
        self.alpha, self.beta = alpha, beta

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor, temperature: float) -> Tensor:
        return losses.dkd(student, teacher, targets, temperature, self.alpha, self.beta)


class GeneralizedJSD(PredictionTerm):
    """The divergence of GKD, for language models; without T^2, as in the paper.

    Args:
        beta: 0: forward KL(teacher || student); 1: reverse KL(student || teacher); between: Jensen-Shannon.
        weight, temperature, schedule, temperature_schedule: as for `PredictionTerm`.
    """

    def __init__(
        self,
        beta: float = 0.5,
        weight: float = 1.0,
        temperature: float = 1.0,
        schedule: Schedule | None = None,
        temperature_schedule: Schedule | None = None,
    ) -> None:
        super().__init__(weight, temperature, schedule, temperature_schedule)
        if not 0 <= beta <= 1:
            raise ValueError(f"--model.losses: GeneralizedJSD has beta {beta}, which must lie in 0 to 1")
        self.beta = beta

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor, temperature: float) -> Tensor:
        return losses.generalised_jsd(student, teacher, self.beta)


class RegressionTerm(Term):
    """Compares the numbers that student and teacher predict; abstract.

    Errors are in units of the standard deviation of the training targets if the data module has the method
    `target_statistics`, which returns their mean and standard deviation; else in the unit of the targets.

    Args:
        weight, schedule: as for every term.
    """

    @abstractmethod
    def forward(self, errors: Tensor) -> Tensor:
        """Return the loss of each error [n, K], the student's prediction minus the teacher's."""


class SquaredError(RegressionTerm):
    """Squared error between the predictions; arguments as for `RegressionTerm`."""

    def forward(self, errors: Tensor) -> Tensor:
        return errors.square()


class HuberError(RegressionTerm):
    """Huber loss (Huber 1964) of the error between the predictions: e^2 / 2 up to delta, then delta (|e| - delta / 2).

    Args:
        delta: error above which the loss is linear, above 0; see `RegressionTerm` for its unit.
        weight, schedule: as for every term.
    """

    def __init__(self, delta: float = 1.0, weight: float = 1.0, schedule: Schedule | None = None) -> None:
        super().__init__(weight, schedule)
        if not 0 < delta < float("inf"):
            raise ValueError(f"--model.losses: HuberError has delta {delta}, which must be a number above 0")
        self.delta = delta

    def forward(self, errors: Tensor) -> Tensor:
        return F.huber_loss(errors, torch.zeros_like(errors), reduction="none", delta=self.delta)


class FeatureTerm(Term):
    """Compares intermediate features of student and teacher; abstract.

    Args:
        student: name of the student's layer whose output is compared, as in `net.named_modules()`; null: the features
            that its output layer reads.
        teacher: name of the teacher's layer.
        weight, schedule: as for every term.
    """

    def __init__(
        self,
        student: str | None = None,
        teacher: str | None = None,
        weight: float = 1.0,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(weight, schedule)
        self.student, self.teacher = student, teacher

    def prepare(self, student: torch.Size, teacher: torch.Size) -> None:
        """Set up the term for the shapes of the two outputs, [1, ...], of a single sample.

        Raises:
            ValueError: if they cannot be compared.
        """

    @abstractmethod
    def forward(self, student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
        """Return the sum over the positions that count.

        Args:
            student, teacher: outputs of the layers [B, ...].
            counted: positions [B] or [B, T], bool; where each text is one sample, the shares of its tokens [B, T].
        """

    def _mismatch(self, accepted: str, student: torch.Size, teacher: torch.Size) -> ValueError:
        layers = f"{self.student or 'the features'} {list(student)}, {self.teacher or 'the features'} {list(teacher)}"
        return ValueError(
            f"--model.losses: {type(self).__name__} compares {accepted}; it was given {layers} (student, teacher)"
        )


class Hint(FeatureTerm):
    """FitNets: squared error between the teacher's layer and a learned regressor of the student's layer.

    The regressor is a linear layer, for maps of images a convolution of 1x1. Arguments as for `FeatureTerm`.
    """

    def prepare(self, student: torch.Size, teacher: torch.Size) -> None:
        maps = len(student) == 4
        places = [size[2:] if maps else size[1:-1] for size in (student, teacher)]
        if len(student) != len(teacher) or places[0] != places[1]:
            raise self._mismatch("layers that differ only in their channels", student, teacher)
        kind: Any = nn.Conv2d if maps else nn.Linear
        channel = 1 if maps else -1
        self.regressor = kind(student[channel], teacher[channel], *([1] if maps else []))

    def forward(self, student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
        regressed = self.regressor(student)
        if student.ndim == 4:
            regressed, teacher = regressed.movedim(1, -1), teacher.movedim(1, -1)  # [B, C, H, W] -> [B, H, W, C]
        return _sum(losses.hint(regressed.float(), teacher.float()), counted)


class AttentionTransfer(FeatureTerm):
    """Squared error between the attention maps of two layers; arguments as for `FeatureTerm`."""

    def prepare(self, student: torch.Size, teacher: torch.Size) -> None:
        tokens_differ = len(student) == 3 and student[1] != teacher[1]
        if len(student) not in (3, 4) or len(student) != len(teacher) or tokens_differ:
            raise self._mismatch("maps [B, C, H, W], or tokens [B, T, C]", student, teacher)

    def forward(self, student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
        pair = _without_padding(student.float(), counted), _without_padding(teacher.float(), counted)
        values = losses.attention_transfer(*pair)
        if _are_tokens(student, counted):  # the mean over those that count
            values = values * (counted.shape[1] / (counted > 0).sum(1).clamp(min=1))
        return _sum(values, counted)


class Relational(FeatureTerm):
    """RKD: distances and angles between the samples of a micro-batch.

    It is not a plain sum over samples: accumulation and the number of processes change it.

    Args:
        distance: factor of the part of distances, 0 or above.
        angle: factor of the part of angles, 0 or above.
        student, teacher, weight, schedule: as for `FeatureTerm`.
    """

    def __init__(
        self,
        distance: float = 25.0,
        angle: float = 50.0,
        student: str | None = None,
        teacher: str | None = None,
        weight: float = 1.0,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(student, teacher, weight, schedule)
        if not (0 <= distance < float("inf") and 0 <= angle < float("inf")):
            raise ValueError(
                f"--model.losses: Relational has distance {distance} and angle {angle}, which must be numbers of 0 or above"
            )
        self.distance, self.angle = distance, angle

    def forward(self, student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
        pair = [_without_padding(features.float(), counted).flatten(1) for features in (student, teacher)]
        loss = student.new_zeros((), dtype=torch.float32)
        with torch.autocast(student.device.type, enabled=False):  # else the products would be in half precision
            if self.distance:
                loss = loss + self.distance * losses.rkd_distance(*pair)
            if self.angle:
                loss = loss + self.angle * losses.rkd_angle(*pair)
        return loss * counted.sum()


class SimilarityPreserving(FeatureTerm):
    """Squared error of the similarities of the samples of a micro-batch; like `Relational`, not a plain sum over
    samples. Arguments as for `FeatureTerm`.
    """

    def forward(self, student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
        with torch.autocast(student.device.type, enabled=False):  # else the products would be in half precision
            pair = _without_padding(student.float(), counted), _without_padding(teacher.float(), counted)
            return losses.similarity_preserving(*pair) * counted.sum()


def _are_tokens(features: Tensor, counted: Tensor) -> bool:
    """True if features are [B, T, C] of the positions [B, T]."""
    return features.ndim == 3 and features.shape[:2] == counted.shape


def _without_padding(features: Tensor, counted: Tensor) -> Tensor:
    """Return features of tokens with 0 where they do not count; other features unchanged."""
    return features.masked_fill((counted == 0)[..., None], 0) if _are_tokens(features, counted) else features


def _sum(values: Tensor, counted: Tensor) -> Tensor:
    """Return the sum of values of positions [B] or [B, T]; other values of a sample [B, ...] are averaged first."""
    if values.shape == counted.shape:
        return torch.where(counted > 0, values * counted, 0).sum()
    B = len(values)
    return (values.reshape(B, -1).mean(1) * counted.reshape(B, -1).sum(1)).sum()
