"""Stochastic depth: in training, each sample skips a residual branch with a given probability.

Source: Huang et al. 2016 (arXiv 1603.09382). Two details are those of later nets: remaining samples are scaled up, so that
evaluation needs no scaling, and the rates begin at 0.

B batch.
"""

from torch import Tensor, nn

from bigmodel.nn.arguments import check_probabilities


class DropPath(nn.Module):
    """Zeroes whole samples of a branch's output [B, ...] and divides the others by the keep probability, so that
    the expected value stays. Draws from torch's random state; does nothing in evaluation.

    Args:
        rate: probability to drop a sample's branch, in [0, 1).
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        check_probabilities(drop_path=rate)
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        mask = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)  # [B, 1, ...]
        return x * mask.div_(1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


def linear_rates(last: float, num_blocks: int) -> list[float]:
    """Return rates that rise linearly with depth, from 0 for the first block to `last` for the last; a single block has
    `last`.
    """
    return [last * i / (num_blocks - 1) for i in range(num_blocks - 1)] + [last]
