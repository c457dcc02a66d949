"""Transforms that move pixels: crops, mirror images, affine maps.

Sources: crops of random area and aspect ratio, Szegedy et al. 2015 (arXiv 1409.4842, section 6).

B images, C channels, H and W pixels, T tries.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bigmodel.data.stateless_rng import uniform
from bigmodel.tasks.image_classification.augment import CROP_STREAM, Transform, require

Padding = Literal["zero", "reflect", "edge"]
_TRIES = 10  # until a box fits


class RandomCrop(Transform):
    """Pads each image on all sides, and crops it to its original size, at whole pixels.

    Args:
        padding: pixels on each side.
        padding_mode: zero (black), reflect (mirrored without the border pixel), edge (the border pixel).
    """

    def __init__(self, padding: int, padding_mode: Padding = "zero") -> None:
        require(padding >= 0, self, f"padding is {padding} pixels, but must be 0 or more")
        require(
            padding_mode in get_args(Padding),
            self,
            f"padding_mode is {padding_mode!r}, but must be one of {', '.join(get_args(Padding))}",
        )
        self.padding, self.padding_mode = padding, padding_mode

    def __call__(self, images: Tensor, keys: Tensor, stream: int) -> Tensor:
        height, width = images.shape[2:]
        if self.padding_mode == "reflect":
            fits = self.padding < min(height, width)
            require(fits, self, f"padding {self.padding} is too large to reflect images of {height} x {width} pixels")
        shifts = (uniform(keys, stream, 2) * (2 * self.padding + 1)).long() - self.padding  # [B, 2]
        rows = shifts[:, :1] + torch.arange(height, device=images.device)  # [B, H]
        columns = shifts[:, 1:] + torch.arange(width, device=images.device)  # [B, W]
        cropped = _take(images, self._inside(rows, height), self._inside(columns, width))
        if self.padding_mode == "zero":
            row_there, column_there = rows == rows.clamp(0, height - 1), columns == columns.clamp(0, width - 1)
            cropped *= (row_there[:, :, None] & column_there[:, None])[:, None]
        return cropped

    def _inside(self, places: Tensor, side: int) -> Tensor:
        """Return the index of the image's pixel at each position of the padded image."""
        if self.padding_mode == "reflect":
            return side - 1 - (side - 1 - places.abs()).abs()
        return places.clamp(0, side - 1)


def _take(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return pixels of images [B, C, H, W] at rows [B, H] and columns [B, W], in the same memory format."""
    batch, channels, height, width = images.shape
    places = (rows[:, :, None] * width + columns[:, None]).reshape(batch, height * width)
    if images.is_contiguous():
        flat = images.reshape(batch, channels, -1)  # [B, C, H, W] -> [B, C, HW]
        return flat.gather(2, places[:, None].expand(-1, channels, -1)).reshape(images.shape)
    # [B, C, H, W] -> [B, HW, C], a view if channels last
    flat = images.permute(0, 2, 3, 1).reshape(batch, -1, channels)
    taken = flat.gather(1, places[:, :, None].expand(-1, -1, channels))
    return taken.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


class RandomFlip(Transform):
    """Mirrors some images.

    Args:
        p: share of the images that are mirrored.
        vertical: swap top and bottom, instead of left and right.
    """

    def __init__(self, p: float = 0.5, vertical: bool = False) -> None:
        require(0 <= p <= 1, self, f"p is {p}, but must be in 0 to 1")
        self.p, self.vertical = p, vertical

    def __call__(self, images: Tensor, keys: Tensor, stream: int) -> Tensor:
        flipped = uniform(keys, stream) < self.p  # [B, 1]
        return torch.where(flipped[:, :, None, None], images.flip(2 if self.vertical else 3), images)


def warp(images: Tensor, matrices: Tensor, outside: Literal["zeros", "border"] = "zeros") -> Tensor:
    """Apply affine maps to images, with bilinear interpolation.

    Args:
        images: [B, C, H, W].
        matrices: [B, 2, 3], map a position (x, y) of the result to the source position, both in pixels, right and down
            from the centre of the image.
        outside: value outside of the image: 0, or the nearest pixel.
    """
    height, width = images.shape[2:]
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = torch.arange(height, device=images.device)[:, None] - (height - 1) / 2
    # Coordinates separately: the matrix product of F.affine_grid is three times as slow on a CPU, and its rounding
    # depends on the batch.
    x_x, x_y, x_1, y_x, y_y, y_1 = matrices.reshape(-1, 6, 1, 1).unbind(1)  # each [B, 1, 1]
    in_x = (x_x * x + (x_y * y + x_1)) / (width / 2)  # [B, H, W]; grid_sample's borders are at -1 and 1
    in_y = (y_x * x + (y_y * y + y_1)) / (height / 2)
    grid = torch.stack((in_x, in_y), dim=3)  # [B, H, W, 2]
    return F.grid_sample(images, grid, padding_mode=outside, align_corners=False).clamp_(0, 1)  # weights are rounded


class RandomAffine(Transform):
    """Shears, rotates, scales and shifts each image about its centre, in this order; black outside of the image.

    Args:
        degrees: maximum rotation in either direction.
        translate: maximum shift in either direction, as a share of the width and of the height.
        scale: smallest and largest enlargement.
        shear: maximum shear along the width in either direction [degrees].
    """

    def __init__(
        self,
        degrees: float = 0.0,
        translate: float = 0.0,
        scale: tuple[float, float] = (1.0, 1.0),
        shear: float = 0.0,
    ) -> None:
        require(0 <= degrees <= 180, self, f"degrees is {degrees}, but must be in 0 to 180")
        require(0 <= translate <= 1, self, f"translate is {translate}, but must be in 0 to 1")
        require(0 < scale[0] <= scale[1], self, f"scale is {list(scale)}, but must be [min, max], both above 0")
        require(0 <= shear < 90, self, f"shear is {shear}, but must be in 0 to below 90 degrees")
        self.degrees, self.translate, self.scale, self.shear = degrees, translate, scale, shear

    def __call__(self, images: Tensor, keys: Tensor, stream: int) -> Tensor:
        height, width = images.shape[2:]
        draws = uniform(keys, stream, 5)
        either_way = draws * 2 - 1
        angle = either_way[:, 0] * math.radians(self.degrees)
        slope = torch.tan(either_way[:, 1] * math.radians(self.shear))
        scale = self.scale[0] + draws[:, 2] * (self.scale[1] - self.scale[0])
        right, down = either_way[:, 3] * self.translate * width, either_way[:, 4] * self.translate * height
        # The inverse: shifted, scaled, rotated and sheared back.
        cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
        x_x, x_y, y_x, y_y = cos - slope * sin, -sin - slope * cos, sin, cos
        to_x = x_x, x_y, -(x_x * right + x_y * down)
        to_y = y_x, y_y, -(y_x * right + y_y * down)
        return warp(images, torch.stack((*to_x, *to_y), dim=1).reshape(-1, 2, 3))


class RandomResizedCrop(Transform):
    """Crops a box of random area and aspect ratio from each image, and enlarges it to the size of the image.

    If images are larger than the input of the net, the box should be cropped from the original at decoding (`boxes`):
    in a batch, which has the net's size already, the box is enlarged from fewer pixels than there were. As it is never
    reduced, no smoothing against aliasing is needed here.

    Args:
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest width over height; its logarithm is uniform.
    """

    flag = "--data.augment or --data.crop"

    def __init__(self, scale: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)) -> None:
        require_box(self, scale, ratio)
        self.scale, self.ratio = scale, ratio

    def __call__(self, images: Tensor, keys: Tensor, stream: int) -> Tensor:
        height, width = images.shape[2:]
        left, top, right, bottom = self._boxes(
            torch.full((len(images),), float(height), device=images.device),
            torch.full((len(images),), float(width), device=images.device),
            keys,
            stream,
        )
        zero = torch.zeros_like(left)
        to_x = (right - left) / width, zero, (left + right - width) / 2
        to_y = zero, (bottom - top) / height, (top + bottom - height) / 2
        matrices = torch.stack((*to_x, *to_y), dim=1).reshape(-1, 2, 3)
        return warp(images, matrices, outside="border")

    def boxes(self, shapes: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Return boxes to crop from images at decoding.

        Args:
            shapes: [B, 2], height and width of each image in pixels.
            keys: [B] int64.

        Returns:
            [B, 4] float64, left, top, right, bottom in whole pixels.
        """
        height, width = torch.from_numpy(shapes.astype(np.float64)).unbind(1)
        return torch.stack(self._boxes(height, width, torch.from_numpy(keys), CROP_STREAM), dim=1).numpy()

    def _boxes(self, height: Tensor, width: Tensor, keys: Tensor, stream: int) -> tuple[Tensor, ...]:
        """Return left, top, right, bottom, each [B], from height [B] and width [B]: the first of ten boxes that fits,
        else the largest central box with an allowed aspect ratio.
        """
        h, w, found = fitting_box(height, width, self.scale, self.ratio, uniform(keys, stream, 2 * _TRIES))
        h = torch.where(found, h, torch.minimum(height, (width / self.ratio[0]).round().clamp(min=1)))
        w = torch.where(found, w, torch.minimum(width, (height * self.ratio[1]).round().clamp(min=1)))
        places = uniform(keys, stream + 1, 2)
        left = torch.where(found, places[:, 0] * (width - w + 1), (width - w) / 2).floor()
        top = torch.where(found, places[:, 1] * (height - h + 1), (height - h) / 2).floor()
        return left, top, left + w, top + h


def fitting_box(
    height: Tensor, width: Tensor, scale: tuple[float, float], ratio: tuple[float, float], draws: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first box of random area and aspect ratio that fits into each image.

    Args:
        height: [B], of the images, in pixels.
        width: [B].
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest width over height.
        draws: [B, 2T] uniform random numbers, for T tries.

    Returns:
        Height and width of the box in whole pixels, and bool, true if there is one; each [B].
    """
    for_area, for_ratio = draws.to(height.dtype).chunk(2, dim=1)  # each [B, T]
    area = (height * width)[:, None] * (scale[0] + (scale[1] - scale[0]) * for_area)
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * for_ratio)
    h, w = torch.sqrt(area / aspect).round(), torch.sqrt(area * aspect).round()
    fits = (h > 0) & (h <= height[:, None]) & (w > 0) & (w <= width[:, None])
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    return h.gather(1, first)[:, 0], w.gather(1, first)[:, 0], fits.any(dim=1)


def require_box(transform: Transform, scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    """Check the ranges of a box's area and aspect ratio."""
    require(0 < scale[0] <= scale[1] <= 1, transform, f"scale is {list(scale)}, but must be [min, max] above 0 to 1")
    require(0 < ratio[0] <= ratio[1], transform, f"ratio is {list(ratio)}, but must be [min, max], both above 0")


def box_mask(left: Tensor, top: Tensor, right: Tensor, bottom: Tensor, height: int, width: int) -> Tensor:
    """Return the mask [B, 1, H, W] of boxes, whose sides [B] are whole pixels and may lie outside of the image."""
    x, y = torch.arange(width, device=left.device), torch.arange(height, device=left.device)
    columns = (x >= left[:, None]) & (x < right[:, None])  # [B, W]
    rows = (y >= top[:, None]) & (y < bottom[:, None])  # [B, H]
    return (rows[:, :, None] & columns[:, None])[:, None]
