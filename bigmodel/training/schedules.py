"""Learning-rate schedules: the learning rate as a factor of its peak, by optimizer step.

Sources: cosine decay from Loshchilov and Hutter (2017); warm-up, stable, decay from Hu et al. (2024, MiniCPM). The
scheduler that is stepped at every optimizer step is created by `bigmodel.training.optimizers.configure`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass


class Schedule(ABC):
    """Learning rate as a factor of its peak, by the number of optimizer steps taken."""

    @abstractmethod
    def __call__(self, step: int, total: int) -> float:
        """Return the factor for optimizer step number `step` (from 0) of a run of `total` steps."""


@dataclass(frozen=True)
class Constant(Schedule):
    """Warm-up, then the peak rate to the end. The other schedules differ only after warm-up.

    Args:
        warmup_steps: optimizer steps over which the factor rises linearly to 1; the first step has 1 / warmup_steps.
    """

    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"--model.schedule.warmup_steps {self.warmup_steps} must not be negative")

    def __call__(self, step: int, total: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.after_warmup(step - self.warmup_steps, max(1, total - self.warmup_steps))

    def after_warmup(self, step: int, total: int) -> float:
        """Return the factor `step` steps after warm-up, out of `total` such steps."""
        return 1.0

    def _check_fraction(self, name: str, value: float) -> None:
        if not 0 <= value <= 1:
            raise ValueError(f"--model.schedule.{name} {value} must be in [0, 1]")


@dataclass(frozen=True)
class Linear(Constant):
    """Warm-up, then a straight line to `final` of the peak, which is reached after the last step.

    Args:
        warmup_steps: optimizer steps of linear warm-up.
        final: the final factor, in 0 to 1.
    """

    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_fraction("final", self.final)

    def after_warmup(self, step: int, total: int) -> float:
        return 1 - (1 - self.final) * min(1.0, step / total)


@dataclass(frozen=True)
class Cosine(Linear):
    """Warm-up, then half a cosine to `final` of the peak, which is reached after the last step."""

    def after_warmup(self, step: int, total: int) -> float:
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))


@dataclass(frozen=True)
class Exponential(Linear):
    """Warm-up, then exponential decay to `final` of the peak, which is reached after the last step.

    Args:
        warmup_steps: optimizer steps of linear warm-up.
        final: the final factor, above 0.
    """

    final: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.final == 0:
            raise ValueError("--model.schedule.final 0 must be above 0: an exponential does not reach 0")

    def after_warmup(self, step: int, total: int) -> float:
        return self.final ** min(1.0, step / total)


@dataclass(frozen=True)
class Step(Constant):
    """Warm-up, then the rate is multiplied by `gamma` at each milestone.

    Args:
        warmup_steps: optimizer steps of linear warm-up.
        milestones: fractions of the steps after warm-up, each in 0 to 1.
        gamma: the factor applied to the rate at each milestone.
    """

    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for milestone in self.milestones:
            self._check_fraction("milestones", milestone)

    def after_warmup(self, step: int, total: int) -> float:
        return self.gamma ** sum(step >= milestone * total for milestone in self.milestones)


@dataclass(frozen=True)
class WarmupStableDecay(Linear):
    """Warm-up, then the peak rate, then a straight line to `final` of it over the last part of the run.

    Args:
        warmup_steps: optimizer steps of linear warm-up.
        final: the final factor, in 0 to 1.
        decay: the fraction of the steps after warm-up over which the rate falls, in 0 to 1.
    """

    decay: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_fraction("decay", self.decay)

    def after_warmup(self, step: int, total: int) -> float:
        falling = self.decay * total
        into_decay = step - (total - falling)
        return 1.0 if into_decay <= 0 else 1 - (1 - self.final) * min(1.0, into_decay / falling)
