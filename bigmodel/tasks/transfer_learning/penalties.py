"""Penalties on the weights, which are added to the loss.

Source of L2-SP: Li, Grandvalet and Davoine 2018 (arXiv 1802.01483, equation 2)::

    strength / 2 |w - w0|^2  over pretrained weights w with initial values w0,  +  head_strength / 2 |v|^2  over new
    ones v

A loss is a sum over samples, and a penalty belongs to their mean: each micro-batch of B samples adds B times the penalty, so
that it does not depend on how a batch is divided.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from bigmodel.data.output_cache import weights_digest


class Penalty(ABC):
    """A function of the trained weights that is added to the mean loss of a sample."""

    @abstractmethod
    def start(self, pretrained: dict[str, nn.Parameter], trained: dict[str, nn.Parameter]) -> None:
        """Set up the penalty before the first step.

        Args:
            pretrained: parameters of the backbone, with their pretrained values.
            trained: those that train, by name; some are pretrained, others new.

        Raises:
            ValueError: if none of its parameters trains.
        """

    @abstractmethod
    def __call__(self) -> Tensor:
        """Return the penalty, a scalar."""

    def identity(self) -> str:
        """Digest that differs if the same weights would be penalised differently with the same settings."""
        return ""


class L2SPPenalty(Penalty):
    """Pulls pretrained weights towards their initial values, and new weights towards 0.

    Args:
        strength: of the pull towards the pretrained weights, biases and norms included.
        head_strength: of that towards 0, on the matrices of the head.
    """

    def __init__(self, strength: float = 0.01, head_strength: float = 0.01) -> None:
        _check("strength", strength)
        _check("head_strength", head_strength)
        self.strength, self.head_strength = strength, head_strength
        self._pretrained: list[nn.Parameter] = []
        self._origin: list[Tensor] = []
        self._new: list[nn.Parameter] = []
        self._identity: str | None = None

    def start(self, pretrained: dict[str, nn.Parameter], trained: dict[str, nn.Parameter]) -> None:
        old = {id(parameter) for parameter in pretrained.values()}
        self._pretrained = [parameter for parameter in trained.values() if id(parameter) in old]
        self._new = [parameter for parameter in trained.values() if id(parameter) not in old and parameter.ndim >= 2]
        if not self._pretrained:
            raise ValueError(
                "--model.penalty L2SPPenalty applies to pretrained weights, and this method trains none of them: set"
                " --model.method to full, gradual or bias_only, or --model.penalty null"
            )
        self._origin = [parameter.detach().clone() for parameter in self._pretrained]

    def __call__(self) -> Tensor:
        device = self._pretrained[0].device
        if self._origin[0].device != device:
            self._origin = [origin.to(device) for origin in self._origin]
        pairs = zip(self._pretrained, self._origin, strict=True)
        distances = torch.stack([(parameter - origin).square().sum() for parameter, origin in pairs])
        norms = torch.stack([parameter.square().sum() for parameter in self._new] or [distances.new_zeros(())])
        return 0.5 * (self.strength * distances.sum() + self.head_strength * norms.sum())

    def identity(self) -> str:
        """Digest of the initial values."""
        if self._identity is None:
            self._identity = weights_digest(nn.ParameterList(self._origin))
        return self._identity


class L1Penalty(Penalty):
    """Pulls trained matrices towards 0, each number by the same amount, which makes many of them 0.

    Args:
        strength: times the sum of absolute values.
    """

    def __init__(self, strength: float = 1e-4) -> None:
        _check("strength", strength)
        self.strength = strength
        self._matrices: list[nn.Parameter] = []

    def start(self, pretrained: dict[str, nn.Parameter], trained: dict[str, nn.Parameter]) -> None:
        self._matrices = [parameter for parameter in trained.values() if parameter.ndim >= 2]
        if not self._matrices:
            raise ValueError(
                "--model.penalty L1Penalty applies to matrices, and this method trains none: set --model.penalty null"
            )

    def __call__(self) -> Tensor:
        return self.strength * torch.stack([parameter.abs().sum() for parameter in self._matrices]).sum()


def _check(name: str, strength: float) -> None:
    if not strength >= 0:
        raise ValueError(f"--model.penalty.{name} {strength} must not be negative")
