"""Mixup (Zhang et al. 2017, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899).

The partner of an image is its neighbour in the global order of samples: rows 0 and 1 of a batch are a pair, rows 2 and
3, and so on. That order is a function of the seed and the epoch, so the pairs are too, for any number of processes and
any even size of micro-batch. The mixing of a row is drawn from its own key, so the rows of a pair are mixed
differently.

B images, C channels, H and W pixels, K classes, N cells of a table.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bigmodel.data.stateless_rng import uniform
from bigmodel.tasks.image_classification.augment import MIX_STREAM
from bigmodel.tasks.image_classification.geometry import box_mask

_CELLS = 8192


class MixupCutMix:
    """Mixes each image and its target with those of its neighbour in the order of samples; in training only.

    Args:
        mixup_alpha: alpha of the Beta(alpha, alpha) distribution of the image's own share; 0: no mixup.
        cutmix_alpha: the same for CutMix, where the neighbour's share is a box of that area; 0: no CutMix.
        p: share of the images that are mixed.
        switch_p: share of CutMix among these, where both are on.

    Raises:
        ValueError: if nothing would be mixed, or a number is out of range.
    """

    def __init__(
        self, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0, p: float = 1.0, switch_p: float = 0.5
    ) -> None:
        for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
            if not 0 <= alpha < float("inf"):
                raise ValueError(f"--data.mix.{name} is {alpha}, but must be 0 (off) or above")
        if mixup_alpha == cutmix_alpha == 0:
            raise ValueError(
                "--data.mix mixes nothing: set --data.mix.mixup_alpha or --data.mix.cutmix_alpha above 0, or leave out"
                " --data.mix"
            )
        for name, share in (("p", p), ("switch_p", switch_p)):
            if not 0 <= share <= 1:
                raise ValueError(f"--data.mix.{name} is {share}, but must be in 0 to 1")
        self.mixup_alpha, self.cutmix_alpha, self.p = mixup_alpha, cutmix_alpha, p
        self.switch_p = switch_p if mixup_alpha and cutmix_alpha else float(cutmix_alpha > 0)
        self._mixup = _Beta(mixup_alpha) if mixup_alpha else None
        self._cutmix = _Beta(cutmix_alpha) if cutmix_alpha else None

    def __call__(
        self, images: Tensor, targets: Tensor, weight: Tensor, keys: Tensor, num_classes: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mix a batch.

        Args:
            images: [B, C, H, W] floating point.
            targets: [B] int64 class numbers, in 0 to K - 1.
            weight: [B] float32, of each image in the loss.
            keys: [B] int64.
            num_classes: K.

        Returns:
            Images [B, C, H, W]; targets [B, K] float32, which sum to 1; weight [B] float32. Weight times cross-entropy is
            the sum of the two images' weighted losses, each times its share.

        Raises:
            ValueError: if B is odd.
        """
        batch = len(images)
        if batch % 2:
            raise ValueError(
                f"--data.mix mixes pairs of images, but a micro-batch has {batch}: set an even --data.micro_batch_size"
            )
        draws = uniform(keys, MIX_STREAM, 5)
        mixed, cut = draws[:, 0] < self.p, draws[:, 1] < self.switch_p  # each [B]
        own = torch.ones_like(draws[:, 0])  # [B], share of the row's own image
        if self._mixup:
            own = torch.where(mixed & ~cut, self._mixup.quantile(draws[:, 2]), own)
        own_here = own[:, None, None, None]  # the same at each pixel
        if self._cutmix:
            outside = ~_box(self._cutmix.quantile(draws[:, 2]), draws[:, 3:], images)  # [B, 1, H, W]
            area = outside.sum(dim=(1, 2, 3)).to(torch.float32) / outside[0].numel()
            own = torch.where(mixed & cut, area, own)
            own_here = torch.where((mixed & cut)[:, None, None, None], outside, own_here)
        images = own_here * images + (1 - own_here) * _partner(images)

        own_weight, other_weight = own * weight, (1 - own) * _partner(weight)
        weight = own_weight + other_weight
        # Where both have weight 0, any target that sums to 1 is valid.
        own_part = torch.where(weight > 0, own_weight / torch.where(weight > 0, weight, 1), own)[:, None]
        classes = torch.zeros(batch, num_classes, device=images.device).scatter_(1, targets[:, None], 1.0)
        return images, own_part * classes + (1 - own_part) * _partner(classes), weight


def _partner(rows: Tensor) -> Tensor:
    """Swap the two rows of each pair in rows [B, ...]."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)  # [B, ...] -> [B/2, 2, ...] -> [B, ...]


def _box(own: Tensor, places: Tensor, images: Tensor) -> Tensor:
    """Return the mask [B, 1, H, W] of boxes of area (1 - own) of the image before clipping at its border.

    Their centres are uniform over its pixels (places [B, 2] are uniform random numbers).
    """
    height, width = images.shape[2:]
    side = torch.sqrt(1 - own)
    half_height, half_width = (side * height).floor() // 2, (side * width).floor() // 2
    y, x = (places[:, 0] * height).floor(), (places[:, 1] * width).floor()
    return box_mask(x - half_width, y - half_height, x + half_width, y + half_height, height, width)


class _Beta:
    """The quantile function of Beta(alpha, alpha), from a table: exact to within a cell of 1/16384 for any alpha.

    The density x^(a-1) (1-x)^(a-1) is symmetric about 1/2. Below that, the first factor, which may have a pole at 0, is
    integrated exactly over each cell, and the second, which is smooth, is taken at the cell's middle.
    """

    def __init__(self, alpha: float) -> None:
        edges = np.linspace(0, 0.5, _CELLS + 1)
        middles = (edges[1:] + edges[:-1]) / 2
        mass = np.diff(edges**alpha) * (1 - middles) ** (alpha - 1)
        below = np.concatenate(([0.0], mass.cumsum()))  # [N + 1]
        self._table = torch.from_numpy((below / (2 * below[-1])).astype(np.float32))

    def quantile(self, probabilities: Tensor) -> Tensor:
        """Return quantiles of probabilities [B] float32."""
        if self._table.device != probabilities.device:
            self._table = self._table.to(probabilities.device)
        lower = torch.minimum(probabilities, 1 - probabilities)
        cell = (torch.searchsorted(self._table, lower, right=True) - 1).clamp_(max=_CELLS - 1)
        before, after = self._table[cell], self._table[cell + 1]
        quantile = (cell + (lower - before) / (after - before)) / (2 * _CELLS)
        return torch.where(probabilities < 0.5, quantile, 1 - quantile)
