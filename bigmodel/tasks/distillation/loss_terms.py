"""The terms of which a distillation's loss is a sum: each a loss of `losses`, a weight, and how that changes in a run.

A term gives a sum over the positions that count: the samples, or all tokens that are predicted. One of what a sample looks
like on the way through the nets counts once for each such position of the sample.

B samples, n positions, K classes, C channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from bigmodel.tasks.distillation import losses
from bigmodel.training.schedules import Schedule

_FAR = 10**9  # optimizer steps, behind the warm-up of any schedule


class Term(nn.Module, ABC):
    """A part of the loss; abstract.

    Args:
        weight: its factor, 0 or above.
        schedule: that factor's own over the run's optimizer steps, as of a learning rate; null: constant.
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
        """Whether anything of it changes in a run."""
        return self.schedule is not None or getattr(self, "temperature_schedule", None) is not None

    def weight_at(self, step: int, total: int) -> float:
        """The factor in the optimizer step number `step` (from 0) of a run of `total`."""
        return self.weight * (self.schedule(step, total) if self.schedule is not None else 1.0)


class PredictionTerm(Term):
    """Compares what student and teacher predict at each position; abstract.

    Args:
        weight, schedule: as for every term.
        temperature: T, by which logits are divided, above 0.
        temperature_schedule: a factor of it over the run's optimizer steps; null: constant.
    """

    needs_classes = False  # of the targets, beside what both predict

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
        if temperature_schedule is not None and temperature_schedule(_FAR, _FAR) <= 0:
            raise ValueError(
                f"--model.losses: {type(self).__name__} ends at temperature {temperature_schedule(_FAR, _FAR):g}, which must"
                " be above 0: give its temperature_schedule another end (final, gamma)"
            )
        self.temperature, self.temperature_schedule = temperature, temperature_schedule

    def temperature_at(self, step: int, total: int) -> float:
        """T in the optimizer step number `step` (from 0) of a run of `total`."""
        factor = self.temperature_schedule(step, total) if self.temperature_schedule is not None else 1.0
        return self.temperature * factor

    @abstractmethod
    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """The loss of each position [n].

        Args:
            student, teacher: log-probabilities [n, K] at the temperature.
            targets: classes [n] int64 of positions that count, any class of others.
            temperature: T.
        """


class KD(PredictionTerm):
    """T^2 KL(teacher || student); arguments as for `PredictionTerm`."""

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor, temperature: float) -> Tensor:
        return losses.kd(student, teacher, temperature)


class DKD(PredictionTerm):
    """Decoupled KD: the divergences of the target's probability, and of those of the other classes among themselves.

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


class FeatureTerm(Term):
    """Compares what student and teacher compute on the way; abstract.

    Args:
        student: the student's layer whose output is compared, as `net.named_modules()` calls it; null: the features that its
            head reads.
        teacher: the teacher's.
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
        """Take the shapes of the two outputs, [1, ...], of a single sample.

        Raises:
            ValueError: if they cannot be compared.
        """

    @abstractmethod
    def forward(self, student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
        """The sum over the positions that count.

        Args:
            student, teacher: what the layers gave [B, ...].
            counted: positions [B] or [B, T], bool; of texts of which each counts once, its tokens' shares [B, T].
        """

    def _refuse(self, what: str, student: torch.Size, teacher: torch.Size) -> ValueError:
        layers = f"{self.student or 'the features'} {list(student)}, {self.teacher or 'the features'} {list(teacher)}"
        return ValueError(
            f"--model.losses: {type(self).__name__} compares {what}, not those of {layers} (student, teacher)"
        )


class Hint(FeatureTerm):
    """FitNets: squared error of the teacher's layer and what a learned regressor makes of the student's: a linear layer, for
    maps of images a convolution of 1x1. Arguments as for `FeatureTerm`."""

    def prepare(self, student: torch.Size, teacher: torch.Size) -> None:
        maps = len(student) == 4
        places = [size[2:] if maps else size[1:-1] for size in (student, teacher)]
        if len(student) != len(teacher) or places[0] != places[1]:
            raise self._refuse("layers of one size but for their channels", student, teacher)
        kind: Any = nn.Conv2d if maps else nn.Linear
        channel = 1 if maps else -1
        self.regressor = kind(student[channel], teacher[channel], *([1] if maps else []))

    def forward(self, student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
        regressed = self.regressor(student)
        if student.ndim == 4:
            regressed, teacher = regressed.movedim(1, -1), teacher.movedim(1, -1)  # [B, C, H, W] -> [B, H, W, C]
        return _sum(losses.hint(regressed.float(), teacher.float()), counted)


class AttentionTransfer(FeatureTerm):
    """Squared error of where two layers are large; arguments as for `FeatureTerm`."""

    def prepare(self, student: torch.Size, teacher: torch.Size) -> None:
        tokens_differ = len(student) == 3 and student[1] != teacher[1]
        if len(student) not in (3, 4) or len(student) != len(teacher) or tokens_differ:
            raise self._refuse("maps [B, C, H, W], or tokens [B, T, C]", student, teacher)

    def forward(self, student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
        pair = _without_padding(student.float(), counted), _without_padding(teacher.float(), counted)
        values = losses.attention_transfer(*pair)
        if _are_tokens(student, counted):  # the mean over those that count
            values = values * (counted.shape[1] / (counted > 0).sum(1).clamp(min=1))
        return _sum(values, counted)


class Relational(FeatureTerm):
    """RKD: the distances and angles between the samples of a micro-batch, which is therefore no mere sum over samples:
    accumulation and the number of processes change it.

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
        with torch.autocast(student.device.type, enabled=False):  # its products would be of halves
            if self.distance:
                loss = loss + self.distance * losses.rkd_distance(*pair)
            if self.angle:
                loss = loss + self.angle * losses.rkd_angle(*pair)
        return loss * counted.sum()


class SimilarityPreserving(FeatureTerm):
    """Squared error of the similarities of the samples of a micro-batch: as `Relational`, no mere sum over samples.
    Arguments as for `FeatureTerm`."""

    def forward(self, student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
        with torch.autocast(student.device.type, enabled=False):  # its products would be of halves
            pair = _without_padding(student.float(), counted), _without_padding(teacher.float(), counted)
            return losses.similarity_preserving(*pair) * counted.sum()


def _are_tokens(features: Tensor, counted: Tensor) -> bool:
    """Whether features are [B, T, C] of the positions [B, T]."""
    return features.ndim == 3 and features.shape[:2] == counted.shape


def _without_padding(features: Tensor, counted: Tensor) -> Tensor:
    """Features of tokens, 0 where they do not count; others as they are."""
    return features.masked_fill((counted == 0)[..., None], 0) if _are_tokens(features, counted) else features


def _sum(values: Tensor, counted: Tensor) -> Tensor:
    """Values of positions [B] or [B, T], or of anything else in a sample [B, ...], which then is a mean over it."""
    if values.shape == counted.shape:
        return torch.where(counted > 0, values * counted, 0).sum()
    B = len(values)
    return (values.reshape(B, -1).mean(1) * counted.reshape(B, -1).sum(1)).sum()
