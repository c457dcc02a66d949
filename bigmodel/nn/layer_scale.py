"""A learned scale for each channel of a residual branch, which starts small so that deep nets train.

Source: Touvron et al. 2021 (arXiv 2103.17239), eq. 4.

D width.
"""

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """x * weight, for x [..., D].

    Args:
        width: channels D.
        start: initial value of all weights.
    """

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weights."""
        nn.init.constant_(self.weight, self.start)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, start={self.start:g}"
