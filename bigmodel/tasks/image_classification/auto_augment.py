"""Policies that draw operations from a fixed list of fourteen.

Sources: RandAugment, Cubuk et al. 2019 (arXiv 1909.13719); TrivialAugment, Müller and Hutter 2021 (arXiv 2103.10158). The
list, the ranges of the magnitudes, and shears about the top left corner are those of both papers' implementations and of
torchvision. Affine operations are bilinear, and black outside of the image.

B images, C channels, H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bigmodel.data.stateless_rng import uniform
from bigmodel.tasks.image_classification import color
from bigmodel.tasks.image_classification.augment import Transform, change_rows_, require
from bigmodel.tasks.image_classification.geometry import warp

_GEOMETRY = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
_ENHANCE = {
    "brightness": color.brightness,
    "saturation": color.saturation,
    "contrast": color.contrast,
    "sharpness": color.sharpness,
}
_OPERATIONS = ("identity", *_GEOMETRY, *_ENHANCE, "posterize", "solarize", "autocontrast", "equalize")


@dataclass(frozen=True)
class _Ranges:
    """Ranges of the operations at the largest magnitude, 1.

    Attributes:
        shear: pixels per pixel.
        translate: pixels along the width, pixels along the height.
        rotate: degrees.
        enhance: how far the factors of brightness, saturation, contrast and sharpness are from 1.
        posterize: bits dropped of eight.
    """

    shear: float
    translate: tuple[float, float]
    rotate: float
    enhance: float
    posterize: int


class RandAugment(Transform):
    """Applies a few random operations of one common magnitude to each image, one after the other.

    The operations are identity, shear x and y, translate x and y, rotate, brightness, color, contrast, sharpness,
    posterize, solarize, autocontrast and equalize. Those that have a sign get a random one for each image.

    Args:
        num_ops: operations for each image.
        magnitude: strength of the operations, 0 to num_magnitude_bins - 1.
        num_magnitude_bins: number of magnitudes; the last one shears by 0.3, shifts by 0.45 of the side, rotates by 30
            degrees, changes brightness and the like by 0.9, posterizes to 4 bits, and solarizes all.
    """

    def __init__(self, num_ops: int = 2, magnitude: int = 9, num_magnitude_bins: int = 31) -> None:
        require(1 <= num_ops <= 14, self, f"num_ops is {num_ops}, but must be in 1 to 14")
        _require_magnitude_bins(self, num_magnitude_bins)
        require(
            0 <= magnitude < num_magnitude_bins,
            self,
            f"magnitude is {magnitude}, but must be in 0 to {num_magnitude_bins - 1}",
        )
        self.num_ops, self.magnitude, self.num_magnitude_bins = num_ops, magnitude, num_magnitude_bins

    def __call__(self, images: Tensor, keys: Tensor, stream: int) -> Tensor:
        height, width = images.shape[2:]
        ranges = _Ranges(0.3, (150 / 331 * width, 150 / 331 * height), 30, 0.9, 4)
        magnitudes = torch.full((len(images),), self.magnitude / (self.num_magnitude_bins - 1), device=images.device)
        images = images.clone()
        for i in range(self.num_ops):
            _operate_(images, uniform(keys, stream + i, 2), magnitudes, ranges)
        return images


class TrivialAugmentWide(Transform):
    """Applies one random operation of random magnitude to each image: the same list as RandAugment, in wider ranges.

    Args:
        num_magnitude_bins: number of magnitudes, from none to the last one, which shears by 0.99, shifts by 32 pixels,
            rotates by 135 degrees, changes brightness and the like by 0.99, posterizes to 2 bits, and solarizes all.
    """

    def __init__(self, num_magnitude_bins: int = 31) -> None:
        _require_magnitude_bins(self, num_magnitude_bins)
        self.num_magnitude_bins = num_magnitude_bins

    def __call__(self, images: Tensor, keys: Tensor, stream: int) -> Tensor:
        draws = uniform(keys, stream, 3)
        magnitudes = (draws[:, 2] * self.num_magnitude_bins).floor() / (self.num_magnitude_bins - 1)
        return _operate_(images.clone(), draws, magnitudes, _Ranges(0.99, (32.0, 32.0), 135, 0.99, 6))


def _require_magnitude_bins(transform: Transform, num_magnitude_bins: int) -> None:
    require(num_magnitude_bins >= 2, transform, f"num_magnitude_bins is {num_magnitude_bins}, but must be 2 or more")


def _operate_(images: Tensor, draws: Tensor, magnitudes: Tensor, ranges: _Ranges) -> Tensor:
    """Apply one operation to each image, in place.

    Args:
        images: [B, C, H, W].
        draws: [B, 2 or more] uniform random numbers, for the operation and for its sign.
        magnitudes: [B] in 0 to 1.
        ranges: of the magnitudes.
    """
    color.has_color(images)  # reject other numbers of channels now, not when a row first draws a change of colour
    operation = (draws[:, 0] * len(_OPERATIONS)).long()  # [B]
    chosen = {name: operation == number for number, name in enumerate(_OPERATIONS)}
    signed = torch.where(draws[:, 1] < 0.5, -magnitudes, magnitudes)

    moved = torch.stack([chosen[name] for name in _GEOMETRY]).any(dim=0)
    change_rows_(images, moved, warp, _matrices(images, chosen, signed, ranges))
    for name, change in _ENHANCE.items():
        change_rows_(images, chosen[name], change, 1 + ranges.enhance * signed)
    dropped = (magnitudes * ranges.posterize).round().to(torch.int32)
    change_rows_(images, chosen["posterize"], color.posterize, dropped)
    change_rows_(images, chosen["solarize"], color.solarize, 255 * (1 - magnitudes))
    change_rows_(images, chosen["autocontrast"], color.autocontrast)
    return change_rows_(images, chosen["equalize"], color.equalize)


def _matrices(images: Tensor, chosen: dict[str, Tensor], signed: Tensor, ranges: _Ranges) -> Tensor:
    """Return matrices [B, 2, 3] of the five affine operations for `warp`, so that one interpolation applies them all."""
    height, width = images.shape[2:]
    shear_x, shear_y = (torch.where(chosen[f"shear_{axis}"], signed * ranges.shear, 0) for axis in "xy")
    angle = torch.where(chosen["rotate"], signed * torch.pi / 180 * ranges.rotate, 0)
    cos, sin = torch.cos(angle), torch.sin(angle)
    right = torch.where(chosen["translate_x"], signed * ranges.translate[0], shear_x * height / 2)
    down = torch.where(chosen["translate_y"], signed * ranges.translate[1], shear_y * width / 2)
    return torch.stack((cos, shear_x - sin, right, shear_y + sin, cos, down), dim=1).reshape(-1, 2, 3)
