"""Transforms that change pixel values but not positions, and the operations they consist of.

The operations follow those of Pillow's ImageEnhance and ImageOps on 8-bit images, without rounding their results to
levels, unless they are defined on levels. The order of summation on a GPU or in a vectorized loop must not matter, so
sums over pixels are of integers.

B images, C channels (1, or 3 for red, green, blue), H and W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigmodel.data.stateless_rng import uniform
from bigmodel.tasks.image_classification.augment import Transform, require

_FIXED_POINT = 65536


class ColorJitter(Transform):
    """Changes brightness, contrast, saturation and hue of each image, always in this order.

    A factor is drawn from 1 - x to 1 + x, but not below 0, where x is the argument; 0 does not change that property. On
    images of one channel, saturation and hue change nothing.

    Args:
        brightness: maximum distance from 1 of the factor of the values.
        contrast: maximum distance from 1 of the factor of the differences from the image's mean grey.
        saturation: maximum distance from 1 of the factor of the differences from the pixel's grey.
        hue: maximum rotation in either direction as a share of the colour circle, 0 to 0.5.
    """

    def __init__(
        self, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0, hue: float = 0.0
    ) -> None:
        for name, value in (("brightness", brightness), ("contrast", contrast), ("saturation", saturation)):
            require(value >= 0, self, f"{name} is {value}, but must be 0 or more")
        require(0 <= hue <= 0.5, self, f"hue is {hue}, but must be in 0 to 0.5")
        self.brightness, self.contrast, self.saturation, self.hue = brightness, contrast, saturation, hue

    def __call__(self, images: Tensor, keys: Tensor, stream: int) -> Tensor:
        either_way = uniform(keys, stream, 4) * 2 - 1
        if self.brightness:
            images = brightness(images, (1 + either_way[:, 0] * self.brightness).clamp(min=0))
        if self.contrast:
            images = contrast(images, (1 + either_way[:, 1] * self.contrast).clamp(min=0))
        if self.saturation:
            images = saturation(images, (1 + either_way[:, 2] * self.saturation).clamp(min=0))
        if self.hue:
            images = turn_hue(images, either_way[:, 3] * self.hue)
        return images


class RandomGrayscale(Transform):
    """Converts some images to grey; the number of channels stays.

    Args:
        p: share of the images that become grey.
    """

    def __init__(self, p: float = 0.1) -> None:
        require(0 <= p <= 1, self, f"p is {p}, but must be in 0 to 1")
        self.p = p

    def __call__(self, images: Tensor, keys: Tensor, stream: int) -> Tensor:
        grey = uniform(keys, stream) < self.p  # [B, 1]
        return torch.where(grey[:, :, None, None], luminance(images), images)


def has_color(images: Tensor) -> bool:
    """True if images [B, C, H, W] have three channels.

    Raises:
        ValueError: if they have neither three nor one.
    """
    channels = images.shape[1]
    if channels not in (1, 3):
        raise ValueError(
            f"--data.augment: transforms of contrast and colour accept images of 1 or 3 channels, not {channels}: leave"
            " them out"
        )
    return channels == 3


def luminance(images: Tensor) -> Tensor:
    """Return the grey value of each pixel [B, 1, H, W], by ITU-R 601-2."""
    if not has_color(images):
        return images
    red, green, blue = images.split(1, dim=1)
    return red * 0.299 + green * 0.587 + blue * 0.114


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Multiply values by factors [B]; 0: black."""
    return (images * factors[:, None, None, None]).clamp_(0, 1)


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Multiply differences from the image's mean grey by factors [B]; 0: that grey."""
    total = (luminance(images) * _FIXED_POINT).round().to(torch.int32).sum(dim=(1, 2, 3), dtype=torch.int64)
    mean = total.to(torch.float32) / (_FIXED_POINT * images[0, 0].numel())
    return _away_from(mean[:, None, None, None], images, factors)


def saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Multiply differences from each pixel's grey by factors [B]; 0: no colour."""
    return _away_from(luminance(images), images, factors)


def sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """Multiply differences from the smoothed image by factors [B]; 0: smooth. Border pixels stay."""
    rows = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
    squares = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = (squares + 4 * images[:, :, 1:-1, 1:-1]) / 13  # each neighbour counts 1, the pixel 5
    return _away_from(smooth, images, factors)


def _away_from(origin: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    return (origin + factors[:, None, None, None] * (images - origin)).clamp_(0, 1)


def turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Add turns [B] of the colour circle to the hue of the HSV hexcone; value and saturation stay."""
    if not has_color(images):
        return images
    red, green, blue = (channel.contiguous() for channel in images.unbind(1))  # each [B, H, W]
    value = torch.maximum(torch.maximum(red, green), blue)
    spread = value - torch.minimum(torch.minimum(red, green), blue)
    divisor = torch.where(spread > 0, spread, 1)
    from_red = (green - blue) / divisor  # in sixths of the circle
    from_green, from_blue = (blue - red) / divisor + 2, (red - green) / divisor + 4
    hue = torch.where(value == red, from_red, torch.where(value == green, from_green, from_blue))
    hue = hue + turns[:, None, None] * 6
    turned = torch.empty_like(images)
    for channel, origin in enumerate((5, 3, 1)):
        place = hue + origin
        place = place - (place / 6).floor() * 6  # modulo 6
        # A channel is lowest at places 1 to 3, opposite to its own hue, and highest at 4 to 6.
        turned[:, channel] = value - spread * torch.minimum(place, 4 - place).clamp_(0, 1)
    return turned


def levels(images: Tensor) -> Tensor:
    """Return the nearest of 256 levels, as a float."""
    return (images * 255).round_()


def posterize(images: Tensor, dropped: Tensor) -> Tensor:
    """Clear the lowest bits of levels, `dropped` [B] int32 of them."""
    bits = dropped[:, None, None, None]
    return (levels(images).to(torch.int32) >> bits << bits).to(torch.float32).div_(255)


def solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    """Invert values at or above `thresholds` [B], in levels."""
    return torch.where(levels(images) >= thresholds[:, None, None, None], 1 - images, images)


def autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel to the range 0 to 1; a constant channel stays."""
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / torch.where(high > low, high - low, 1), images)


def equalize(images: Tensor) -> Tensor:
    """Equalize the histogram of each channel: all levels become about equally frequent."""
    batch, channels, height, width = images.shape
    old = levels(images).long().reshape(batch * channels, height * width)  # [B, C, H, W] -> [BC, HW]
    first = torch.arange(0, len(old) * 256, 256, device=images.device)[:, None]
    counts = torch.zeros(len(old) * 256, dtype=torch.int64, device=images.device)
    counts = counts.scatter_add_(0, (old + first).flatten(), torch.ones_like(old).flatten()).reshape(-1, 256)
    # Pillow's rule: as many pixels for each new level, the brightest level that occurs not counted.
    step = (height * width - counts.gather(1, old.amax(dim=1, keepdim=True))) // 255  # [BC, 1]
    below = counts.cumsum(dim=1) - counts
    new = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)  # [BC, 256]
    moved = torch.where(step > 0, new.gather(1, old), old)
    return moved.to(torch.float32).div_(255).reshape(images.shape)
