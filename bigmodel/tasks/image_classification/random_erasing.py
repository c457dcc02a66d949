"""Random erasing, Zhong et al. 2017 (arXiv 1708.04896).

B images, C channels, H and W pixels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bigmodel.data.stateless_rng import uniform
from bigmodel.tasks.image_classification.augment import Transform, change_rows_, require
from bigmodel.tasks.image_classification.geometry import box_mask, fitting_box, require_box

_TRIES = 10  # until a box fits; at the defaults nearly every first one does


class RandomErasing(Transform):
    """Erases a box in some images.

    Noise is uniform over the values of a pixel, independent for each pixel and channel, as in the paper. (Where images
    are erased after normalization, other libraries take standard normal noise instead.)

    Args:
        p: share of the images in which a box is erased.
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest width over height; its logarithm is uniform.
        value: noise, or one number in 0 (black) to 1 (white).
    """

    def __init__(
        self,
        p: float = 0.25,
        scale: tuple[float, float] = (0.02, 1 / 3),
        ratio: tuple[float, float] = (0.3, 3.3),
        value: float | Literal["noise"] = "noise",
    ) -> None:
        require(0 <= p <= 1, self, f"p is {p}, but must be in 0 to 1")
        require_box(self, scale, ratio)
        accepted = value == "noise" if isinstance(value, str) else 0 <= value <= 1
        require(accepted, self, f"value is {value!r}, but must be noise, or a number in 0 to 1")
        self.p, self.scale, self.ratio, self.value = p, scale, ratio, value

    def __call__(self, images: Tensor, keys: Tensor, stream: int) -> Tensor:
        chosen = uniform(keys, stream)[:, 0] < self.p  # [B]
        return change_rows_(images.clone(), chosen, lambda some, keys: self._erase(some, keys, stream), keys)

    def _erase(self, images: Tensor, keys: Tensor, stream: int) -> Tensor:
        height, width = images.shape[2:]
        sides = torch.empty(2, len(images), device=images.device)
        sides[0], sides[1] = height, width
        h, w, found = fitting_box(sides[0], sides[1], self.scale, self.ratio, uniform(keys, stream + 1, 2 * _TRIES))
        places = uniform(keys, stream + 2, 2)
        top, left = (places[:, 0] * (height - h + 1)).floor(), (places[:, 1] * (width - w + 1)).floor()
        erased = box_mask(left, top, left + w, top + h, height, width) & found[:, None, None, None]
        if self.value == "noise":
            return torch.where(erased, uniform(keys, stream + 3, images[0].numel()).reshape(images.shape), images)
        return torch.where(erased, self.value, images)
