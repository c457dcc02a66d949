"""Residual networks, from those of ImageNet to the small ones of CIFAR, by their arguments.

Sources: He et al. 2015 (arXiv 1512.03385), table 1 for ImageNet, section 4.2 for CIFAR; Goyal et al. 2017 (arXiv
1706.02677), section 5.1, for the stride in the 3x3 convolution and the last scale of a branch that starts at zero.
Every shortcut that changes shape is a projection (the paper's option B); the paper's CIFAR nets pad with zeros there.

B batch, C channels, H and W pixels, D width of the last stage's output, K classes.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from bigmodel.nn.arguments import check_choice, check_sizes
from bigmodel.nn.drop_path import DropPath, linear_rates
from bigmodel.nn.memory_format import guard_convolutions

StemKind = Literal["auto", "imagenet", "cifar"]

_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_EXPANSION = 4  # channels out of a bottleneck, per channel inside


def _conv_norm(in_channels: int, out_channels: int, size: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


class Block(nn.Module):
    """relu(shortcut(x) + branch(x)): [B, in_channels, H, W] -> [B, out_channels, H / stride, W / stride].

    The branch is two 3x3 convolutions, or with `bottleneck` a 1x1, a 3x3 and a 1x1 that has four times their width.
    """

    def __init__(self, in_channels: int, width: int, stride: int, *, bottleneck: bool, drop_path: float) -> None:
        super().__init__()
        out_channels = width * _EXPANSION if bottleneck else width
        if bottleneck:
            self.branch = nn.Sequential(
                *_conv_norm(in_channels, width, 1),
                nn.ReLU(inplace=True),
                *_conv_norm(width, width, 3, stride),
                nn.ReLU(inplace=True),
                *_conv_norm(width, out_channels, 1),
            )
        else:
            self.branch = nn.Sequential(
                *_conv_norm(in_channels, width, 3, stride), nn.ReLU(inplace=True), *_conv_norm(width, width, 3)
            )
        projects = stride > 1 or in_channels != out_channels
        self.shortcut = nn.Sequential(*_conv_norm(in_channels, out_channels, 1, stride) if projects else [])
        self.drop_path = DropPath(drop_path)
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.drop_path(self.branch(x)), inplace=True)


class ResNet(nn.Module):
    """A residual network: maps images [B, C, H, W] to logits [B, K].

    `depth` names a net of the papers. 18, 34, 50, 101 and 152 have four stages of 64, 128, 256 and 512 channels; from
    50 on their blocks are bottlenecks. Any other depth must be 6 n + 2 (20, 32, 44, 56, 110), which has three stages of
    16, 32 and 64 channels with n basic blocks each. The resnet8x4 and resnet32x4 of the distillation papers are depth 8
    and 32 with widths [64, 128, 256] and stem_width 32. Any other net is described by `blocks` and `widths`.
    Each stage but the first halves the image. `stages[i]` is a stage, `stages[i][j]` a block of it.

    Args:
        num_classes: number of classes K.
        in_channels: channels C of an image.
        image_size: pixels on a side; determines the stem for "auto".
        depth: number of layers with weights, as the papers count; null: 18, or determined by `blocks`.
        blocks: blocks in each stage, instead of `depth`.
        widths: channels of each stage's 3x3 convolutions; null: those of the depth, or 64, 128, 256 ... with `blocks`.
        bottleneck: blocks of three convolutions, four times as wide at their end; null: determined by the depth.
        stem: "imagenet" (7x7 convolution of stride 2, then max-pooling: a quarter of the size), "cifar" (3x3 of
            stride 1), or "auto": "cifar" for images up to 64 pixels.
        stem_width: channels after the stem; null: those of the first stage.
        width_factor: multiplies all widths, the stem's too.
        drop_path: probability to skip a block's branch (stochastic depth) at the last block, rising from 0 at the first.
        zero_init: start each branch's last scale at zero, so that a new net's blocks are shortcuts only.

    Raises:
        ValueError: a depth that does not exist, or inconsistent sizes.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        image_size: int,
        *,
        depth: int | None = None,
        blocks: tuple[int, ...] | None = None,
        widths: tuple[int, ...] | None = None,
        bottleneck: bool | None = None,
        stem: StemKind = "auto",
        stem_width: int | None = None,
        width_factor: float = 1.0,
        drop_path: float = 0.0,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        check_choice("stem", stem, StemKind)
        if depth is None and blocks is None:
            depth = 18
        blocks, widths = _stage_sizes(depth, blocks, widths)
        if bottleneck is None:
            bottleneck = depth in (50, 101, 152)
        check_sizes(blocks=min(blocks), widths=min(widths), stem_width=1 if stem_width is None else stem_width)
        stem_width = _scaled(widths[0] if stem_width is None else stem_width, width_factor)
        if stem == "auto":
            stem = "cifar" if image_size <= 64 else "imagenet"

        self.zero_init = zero_init
        if stem == "cifar":
            self.stem = nn.Sequential(*_conv_norm(in_channels, stem_width, 3), nn.ReLU(inplace=True))
        else:
            self.stem = nn.Sequential(
                *_conv_norm(in_channels, stem_width, 7, stride=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)
            )
        rates = iter(linear_rates(drop_path, sum(blocks)))
        channels = stem_width
        self.stages = nn.ModuleList()
        for i, (num_blocks, width) in enumerate(zip(blocks, widths, strict=True)):
            stage = nn.Sequential()
            for j in range(num_blocks):
                stride = 2 if i > 0 and j == 0 else 1
                block = Block(
                    channels, _scaled(width, width_factor), stride, bottleneck=bottleneck, drop_path=next(rates)
                )
                stage.append(block)
                channels = block.out_channels
            self.stages.append(stage)
        self.head = nn.Linear(channels, num_classes)
        guard_convolutions(self)  # shortcuts of few channels, in whatever format images come
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all weights, from torch's random state."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d | nn.Linear):
                module.reset_parameters()
        for module in self.modules():
            if self.zero_init and isinstance(module, Block):
                nn.init.zeros_(module.branch[-1].get_parameter("weight"))

    def features(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] to features [B, D], the mean over the last stage's positions."""
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        return x.mean(dim=(2, 3))  # [B, D, h, w] -> [B, D]

    def logits(self, features: Tensor) -> Tensor:
        """Map features [..., D] to logits [..., K]."""
        return self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K] of images [B, C, H, W]."""
        return self.logits(self.features(images))


def _stage_sizes(
    depth: int | None, blocks: tuple[int, ...] | None, widths: tuple[int, ...] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the number of blocks and the width of each stage."""
    if blocks is not None and depth is not None:
        raise ValueError(
            f"depth {depth} and blocks {list(blocks)} both set the number of blocks; "
            "set only one of --model.net.depth and --model.net.blocks"
        )
    if blocks is None:
        assert depth is not None
        blocks = _blocks(depth)
    if widths is None:
        first = 64 if depth is None or depth in _BLOCKS else 16
        widths = tuple(first * 2**i for i in range(len(blocks)))
    if len(blocks) != len(widths) or not blocks:
        raise ValueError(
            f"widths {list(widths)} are for {len(widths)} stages, blocks {list(blocks)} for {len(blocks)}; "
            "set --model.net.widths and --model.net.blocks to one number for each stage"
        )
    return blocks, widths


def _blocks(depth: int) -> tuple[int, ...]:
    """Return the number of blocks in each stage of the published net of this depth."""
    if depth in _BLOCKS:
        return _BLOCKS[depth]
    if depth < 8 or depth % 6 != 2:
        raise ValueError(
            f"there is no ResNet of depth {depth}: set --model.net.depth to {', '.join(map(str, _BLOCKS))}, or 6 n + 2 "
            "(8, 14, 20, 32, 44, 56, 110 ...), or set --model.net.blocks and --model.net.widths"
        )
    return ((depth - 2) // 6,) * 3


def _scaled(width: int, factor: float) -> int:
    scaled = round(width * factor)
    if scaled < 1 or abs(scaled - width * factor) > 1e-6:
        raise ValueError(
            f"width_factor {factor} makes {width * factor:g} channels of {width}; choose --model.net.width_factor so that "
            "all widths are whole numbers"
        )
    return scaled
