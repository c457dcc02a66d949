"""Checks of arguments and inputs of the nets; errors name the received value, the accepted ones and the flag to set."""

from typing import get_args

from torch import Tensor


def check_sizes(**sizes: int) -> None:
    """Raise an error if a size is below one."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}, but must be at least 1; choose --model.net.{name}")


def check_choice(name: str, value: str, choices: object) -> None:
    """Raise an error if a value is not one of a Literal's."""
    if value not in get_args(choices):
        raise ValueError(f"{name} {value!r} is none of {', '.join(get_args(choices))}; choose --model.net.{name}")


def check_probabilities(**probabilities: float) -> None:
    """Raise an error if a value is not a valid dropout probability."""
    for name, probability in probabilities.items():
        if not 0 <= probability < 1:
            raise ValueError(f"{name} {probability} is not in [0, 1); choose --model.net.{name}")


def check_images(images: Tensor, in_channels: int, image_size: int) -> None:
    """Raise an error if images are not [B, in_channels, image_size, image_size]."""
    expected = [in_channels, image_size, image_size]
    if list(images.shape[1:]) != expected:
        raise ValueError(
            f"images have shape {list(images.shape)}, but this net was made for [batch, {', '.join(map(str, expected))}]"
        )
