"""ConvNeXt: a convolutional net with the proportions of a vision transformer.

Source: Liu et al. 2022 (arXiv 2201.03545), figure 4 for the block, section 3 for the sizes.

B batch, C channels, H and W pixels, D width of the last stage, K classes.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from bigmodel.nn.arguments import check_sizes
from bigmodel.nn.drop_path import DropPath, linear_rates
from bigmodel.nn.layer_scale import LayerScale

_INIT_STD = 0.02
_NORM_EPS = 1e-6


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of x [B, C, H, W]; needs no copy in channels_last."""

    def __init__(self, width: int) -> None:
        super().__init__(width, _NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # [B, C, H, W] -> [B, H, W, C] and back


class Block(nn.Module):
    """x + scale * mlp(norm(depthwise(x))): [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, width: int, *, layer_scale: float | None, drop_path: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, _NORM_EPS)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.scale = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.norm(self.depthwise(x).permute(0, 2, 3, 1))  # [B, C, H, W] -> [B, H, W, C]
        branch = self.scale(self.down(F.gelu(self.up(branch))))
        return x + self.drop_path(branch.permute(0, 3, 1, 2))  # [B, H, W, C] -> [B, C, H, W]


class ConvNeXt(nn.Module):
    """A ConvNeXt: maps images [B, C, H, W] to logits [B, K]. The defaults make ConvNeXt-T; S has depths [3, 3, 27, 3],
    B those and widths [128, 256, 512, 1024].

    `stages[i]` begins with the layer that makes the image smaller, the stem or a convolution that halves it; blocks
    follow.

    Args:
        num_classes: number of classes K.
        in_channels: channels C of an image.
        image_size: pixels on a side, a multiple of patch_size.
        depths: blocks in each stage.
        widths: channels of each stage.
        patch_size: pixels on a side that the stem makes one position; null: 4 for images over 64 pixels, 2 over 32,
            else 1.
        layer_scale: initial value of the learned scales of all branches; null: none.
        drop_path: probability to skip a branch (stochastic depth) in the last block, rising from 0 in the first.

    Raises:
        ValueError: inconsistent sizes, or an image too small for so many stages.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        image_size: int,
        *,
        depths: tuple[int, ...] = (3, 3, 9, 3),
        widths: tuple[int, ...] = (96, 192, 384, 768),
        patch_size: int | None = None,
        layer_scale: float | None = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if patch_size is None:
            patch_size = 4 if image_size > 64 else 2 if image_size > 32 else 1
        if len(depths) != len(widths) or not depths:
            raise ValueError(
                f"widths {list(widths)} are for {len(widths)} stages, depths {list(depths)} for {len(depths)}; "
                "give --model.net.widths and --model.net.depths one number for each stage"
            )
        check_sizes(depths=min(depths), widths=min(widths), patch_size=patch_size)
        if image_size % patch_size:
            raise ValueError(
                f"images of {image_size} pixels cannot be cut into patches of {patch_size}; choose a divisor as "
                "--model.net.patch_size"
            )
        smallest = patch_size * 2 ** (len(depths) - 1)
        if image_size < smallest:
            raise ValueError(
                f"images of {image_size} pixels are too small for {len(depths)} stages after patches of {patch_size}, "
                f"which need {smallest}; give fewer --model.net.depths and --model.net.widths, or a smaller "
                "--model.net.patch_size"
            )

        rates = iter(linear_rates(drop_path, sum(depths)))
        channels = in_channels
        self.stages = nn.ModuleList()
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            if i == 0:
                stage = nn.Sequential(nn.Conv2d(channels, width, patch_size, stride=patch_size), ChannelNorm(width))
            else:
                stage = nn.Sequential(ChannelNorm(channels), nn.Conv2d(channels, width, 2, stride=2))
            for _ in range(depth):
                stage.append(Block(width, layer_scale=layer_scale, drop_path=next(rates)))
            self.stages.append(stage)
            channels = width
        self.norm = nn.LayerNorm(channels, _NORM_EPS)
        self.head = nn.Linear(channels, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all weights, from torch's random state."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=_INIT_STD, a=-2 * _INIT_STD, b=2 * _INIT_STD)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | LayerScale):
                module.reset_parameters()

    def features(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] to features [B, D], the mean over the last stage's positions after the final norm."""
        x = images
        for stage in self.stages:
            x = stage(x)
        return self.norm(x.mean(dim=(2, 3)))  # [B, D, h, w] -> [B, D]

    def logits(self, features: Tensor) -> Tensor:
        """Map features [..., D] to logits [..., K]."""
        return self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K] of images [B, C, H, W]."""
        return self.logits(self.features(images))
